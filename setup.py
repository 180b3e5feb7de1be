"""Package definition. Bounds are those of pause_megatron/versions.py; launchers/constraints.txt pins one tested set."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

# By its path: an isolated build has nothing that the package itself imports.
PACKAGE = Path(__file__).parent / "pause_megatron"
VERSIONS = runpy.run_path(str(PACKAGE / "versions.py"))
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="pause-megatron",
    version=VERSION,
    description="Pause-token pretraining for Megatron datasets and models under DeepSpeed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=VERSIONS["PYTHON"].specifier,
    packages=[
        *find_packages(include=["pause_megatron", "pause_megatron.*"]),
        "pause_megatron.ds_configs",
    ],
    # The DeepSpeed files live at the top of the repository, where users look for them, and install with the package.
    package_dir={"pause_megatron.ds_configs": "ds_configs"},
    package_data={
        "pause_megatron": ["py.typed", "recipes/*.yaml", "recipes/experiments/*.yaml", "tasks/*.yaml"],
        "pause_megatron.experiment": ["*.yaml", "report/*.css", "report/*.js"],
        "pause_megatron.slurm": ["*.sbatch"],
        "pause_megatron.ds_configs": ["*.json"],
    },
    install_requires=[*(package.requirement for package in VERSIONS["PACKAGES"]), VERSIONS["TRITON"]],
    extras_require={
        extra: [package.requirement for package in packages] for extra, packages in VERSIONS["EXTRAS"].items()
    },
    entry_points={"console_scripts": ["pause-megatron = pause_megatron.cli:main"]},
)
