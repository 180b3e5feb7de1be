"""Probes of `doctor` for Python and packages: whether they import, and whether their versions were tested together."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import pkgutil
import platform
import sys
from collections.abc import Iterator

import pause_megatron
from pause_megatron.cli.support.finding import Finding, Probe
from pause_megatron.cli.support.packages import EXTRAS, absent_package
from pause_megatron.versions import PYTHON, TRIED, Package, installed_version, release

_TRITON_KERNELS = "pause_megatron.model.kernels.triton_kernels"


def python() -> Iterator[Finding]:
    """Check the version of Python.

    Yields:
        The version, and the operating system.
    """
    version = platform.python_version()
    good = PYTHON.admits(version)
    yield Finding(
        "python",
        "ok" if good else "missing",
        f"{version} ({sys.executable})",
        "" if good else f"make the environment with Python {PYTHON.lowest} to {PYTHON.newest}",
    )
    yield Finding("system", "note", f"{platform.system()} {platform.release()} {platform.machine()}")


def needed(package: Package) -> tuple[str, Probe]:
    """Return the probe of a package that training needs: that it imports, in a supported version.

    Args:
        package: Name and range of versions.
    """

    def probe() -> Iterator[Finding]:
        try:
            module = importlib.import_module(package.module or package.name)
        except Exception as error:  # an import may raise anything
            yield Finding(package.name, "missing", f"cannot be imported: {_reason(error)}", _cure(package, error))
            return
        version = _version(package, module)
        if not version[:1].isdigit():
            yield Finding(package.name, "note", f"{version}: expected {package.specifier}")
        elif not package.admits(version):
            text = f"{version}: expected {package.specifier}; other versions are not tested with this pause-megatron"
            yield Finding(package.name, "missing", text, _install(package))
        elif release(version) > release(package.newest):
            yield Finding(package.name, "note", f"{version}; the newest tested version is {package.newest}")
        else:
            yield Finding(package.name, "ok", version)

    return package.name, probe


def optional(name: str, module: str, use: str) -> tuple[str, Probe]:
    """Return the probe of an optional package.

    Args:
        name: Name of the distribution.
        module: Module to import.
        use: What it is used for.
    """

    def probe() -> Iterator[Finding]:
        try:
            imported = importlib.import_module(module)
        except Exception:
            yield Finding(name, "optional", f"absent ({use}); nothing needs it")
            return
        yield Finding(name, "ok", _version(Package(name, "0", "0"), imported))

    return name, probe


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def _install(package: Package) -> str:
    return f"pip install '{package.name}{package.specifier}'"


def _cure(package: Package, error: Exception) -> str:
    """Return what to install for a failed import; it may be a package that the imported one requires."""
    absent = (getattr(error, "name", None) or "").partition(".")[0]
    own = (package.module or package.name).partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not absent or absent == own:
        return _install(package)
    if absent == "triton":
        return "pip install triton   # megatron-core imports it, on a CPU too, without declaring it"
    return f"pip install {absent}   # {package.name} imports it"


def _version(package: Package, module: object) -> str:
    return installed_version(package.name) or str(getattr(module, "__version__", "unknown version"))


def tried_together() -> Iterator[Finding]:
    """List the minor releases that were tested together, and check whether the installed ones are among them.

    Yields:
        Each combination, then the installed one.
    """
    mine = (platform.python_version(), *(importlib.metadata.version(name) for name in ("torch", "megatron-core")))
    here = "Python {}, torch {}, megatron-core {}".format(*mine)
    for tried in TRIED:
        text = f"Python {tried.python}, torch {tried.torch}, megatron-core {tried.megatron_core}"
        yield Finding("tested together", "note", text + (" (as here)" if tried.like(*mine) else ""))
    if any(tried.like(*mine) for tried in TRIED):
        yield Finding("versions here", "ok", f"{here}: tested together")
    else:
        advice = "pip install --constraint launchers/constraints.txt torch megatron-core"
        yield Finding("versions here", "note", f"{here}: each is in its range, not tested together", advice)


def own_modules() -> Iterator[Finding]:
    """Import every module of this package, which shows names that another package dropped or moved.

    Yields:
        The first module that cannot be imported, or their number.
    """
    names = [
        name
        for _, name, _ in pkgutil.walk_packages(pause_megatron.__path__, "pause_megatron.")
        if name.rpartition(".")[2] != "__main__"
    ]
    left_out = set()
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            absent = error if isinstance(error, ModuleNotFoundError) else None
            package = (absent.name or "").partition(".")[0] if absent else ""
            if package in EXTRAS:  # not needed for training
                left_out.add(f"modules of the extra pause-megatron[{EXTRAS[package]}]")
                continue
            if package == "triton" and name == _TRITON_KERNELS:
                left_out.add("the Triton kernels")
                continue
            advice = (absent and absent_package(absent)) or "install the versions of launchers/constraints.txt"
            yield Finding("own modules", "missing", f"{name} cannot be imported: {_reason(error)}", advice)
            return
    text = f", but for {' and '.join(sorted(left_out))}" if left_out else ""
    yield Finding("own modules", "ok", f"all {len(names)} can be imported{text}")


def triton() -> Iterator[Finding]:
    """Check that triton imports; training runs without its kernels.

    Yields:
        The version, or the reason of the failure.
    """
    try:
        module = importlib.import_module("triton")
    except Exception as error:
        text = f"cannot be imported: {_reason(error)}; engine.kernels=triton is not available, auto is plain"
        yield Finding("triton", "note", text, "fine on a CPU; on a GPU plain is slower, and compiled is there as well")
        return
    yield Finding("triton", "ok", _version(Package("triton", "0", "0"), module))


def torch_backends() -> Iterator[Finding]:
    """Check the backends of torch.distributed.

    Yields:
        Their names.
    """
    distributed = importlib.import_module("torch").distributed
    backends = [name for name in ("gloo", "nccl", "mpi") if getattr(distributed, f"is_{name}_available")()]
    yield Finding(
        "torch backends",
        "ok" if "gloo" in backends else "missing",
        ", ".join(backends) or "none",
        "" if "gloo" in backends else "install a torch that was built with torch.distributed",
    )


def accelerator() -> Iterator[Finding]:
    """Check the device that DeepSpeed chooses.

    Yields:
        Its name, and a contradiction to DS_ACCELERATOR.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    chosen = importlib.import_module("deepspeed.accelerator").get_accelerator()._name
    yield Finding("accelerator", "ok", f"DeepSpeed chose {chosen}")
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted and wanted != chosen:
        yield Finding("DS_ACCELERATOR", "missing", f"is {wanted!r}, but DeepSpeed chose {chosen!r}", "unset it")
