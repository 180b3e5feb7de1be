"""What `doctor` says of Python and of packages: whether they import, and whether their versions were run together."""

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
from pause_megatron.versions import PYTHON, TRIED, Package, release

_TRITON_KERNELS = "pause_megatron.model.kernels.triton_kernels"


def python() -> Iterator[Finding]:
    """Say which Python this is, and whether it is one of those that were run."""
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
    """Make the probe of a package that training needs: it imports, and its version lies in the range of the table."""

    def probe() -> Iterator[Finding]:
        try:
            module = importlib.import_module(package.module or package.name)
        except Exception as error:  # an import may fail in any way there is
            yield Finding(package.name, "missing", f"cannot be imported: {_reason(error)}", _cure(package, error))
            return
        version = _version(package, module)
        if not version[:1].isdigit():
            yield Finding(package.name, "note", f"{version}: expected {package.specifier}")
        elif not package.admits(version):
            text = f"{version}: expected {package.specifier}; nothing else was run with this pause-megatron"
            yield Finding(package.name, "missing", text, _install(package))
        elif release(version) > release(package.newest):
            yield Finding(package.name, "note", f"{version}; the newest that was run is {package.newest}")
        else:
            yield Finding(package.name, "ok", version)

    return package.name, probe


def optional(name: str, module: str, use: str) -> tuple[str, Probe]:
    """Make the probe of a package that is good for `use` and that nothing needs."""

    def probe() -> Iterator[Finding]:
        try:
            imported = importlib.import_module(module)
        except Exception:
            yield Finding(name, "optional", f"absent ({use}); nothing needs it")
            return
        yield Finding(name, "ok", _version(Package(name, "0", "0"), imported))

    return name, probe


def _reason(error: Exception) -> str:
    """The first line of what it says."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def _install(package: Package) -> str:
    return f"pip install '{package.name}{package.specifier}'"


def _cure(package: Package, error: Exception) -> str:
    """What to install for an import that failed: often not the package itself, but one that it takes for granted."""
    absent = (getattr(error, "name", None) or "").partition(".")[0]
    own = (package.module or package.name).partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not absent or absent == own:
        return _install(package)
    if absent == "triton":
        return "pip install triton   # megatron-core imports it, on a CPU too, and does not ask pip for it"
    return f"pip install {absent}   # {package.name} imports it"


def _version(package: Package, module: object) -> str:
    try:
        return importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown version"))


def tried_together() -> Iterator[Finding]:
    """Say which minor releases the tests were run on together, and whether those that are installed are among them."""
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
    """Import every module of this package: names that a release of another package dropped or moved show here."""
    names = [
        name
        for _, name, _ in pkgutil.walk_packages(pause_megatron.__path__, "pause_megatron.")
        if name.rpartition(".")[2] != "__main__"
    ]
    but = set()
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            absent = error if isinstance(error, ModuleNotFoundError) else None
            package = (absent.name or "").partition(".")[0] if absent else ""
            if package in EXTRAS:  # nobody needs it for training
                but.add(f"what pause-megatron[{EXTRAS[package]}] brings")
                continue
            if package == "triton" and name == _TRITON_KERNELS:
                but.add("the Triton kernels")
                continue
            advice = (absent and absent_package(absent)) or "install the versions of launchers/constraints.txt"
            yield Finding("own modules", "missing", f"{name} cannot be imported: {_reason(error)}", advice)
            return
    text = f", but for {' and '.join(sorted(but))}" if but else ""
    yield Finding("own modules", "ok", f"all {len(names)} can be imported{text}")


def triton() -> Iterator[Finding]:
    """Say which triton is here. Training does without its kernels; a megatron-core that does not has said so above."""
    try:
        module = importlib.import_module("triton")
    except Exception as error:
        text = f"cannot be imported: {_reason(error)}; engine.kernels=triton is not available, auto means plain"
        yield Finding("triton", "note", text, "fine on a CPU; on a GPU plain is slower, and compiled is there as well")
        return
    yield Finding("triton", "ok", _version(Package("triton", "0", "0"), module))


def torch_backends() -> Iterator[Finding]:
    """Say over what ranks can talk to each other."""
    distributed = importlib.import_module("torch").distributed
    backends = [name for name in ("gloo", "nccl", "mpi") if getattr(distributed, f"is_{name}_available")()]
    yield Finding(
        "torch backends",
        "ok" if "gloo" in backends else "missing",
        ", ".join(backends) or "none",
        "" if "gloo" in backends else "install a torch that was built with torch.distributed",
    )


def accelerator() -> Iterator[Finding]:
    """Say what DeepSpeed takes for the device."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    chosen = importlib.import_module("deepspeed.accelerator").get_accelerator()._name
    yield Finding("accelerator", "ok", f"DeepSpeed chose {chosen}")
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted and wanted != chosen:
        yield Finding("DS_ACCELERATOR", "missing", f"is {wanted!r}, but DeepSpeed chose {chosen!r}", "unset it")
