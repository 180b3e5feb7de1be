"""Where results are from: program, libraries and machine of each cell, and the commands that ran an experiment."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from pause_megatron import __version__
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.declared import read_declaration
from pause_megatron.experiment.stored import StoredFile
from pause_megatron.files.durable import write_whole
from pause_megatron.files.typed_json import Number, TypedJson
from pause_megatron.versions import installed_version

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "numpy")
DECLARED = "declared.yaml"
"""The copy of the grid's pre-declaration in DIR."""


class Origin(TypedJson):
    """A program on a machine.

    Attributes:
        package: Version of this package.
        commit: Its git commit, with "+changes" if its files differ from it; None outside of a repository.
        python: Version of Python.
        packages: Versions of `PACKAGES`; None for one that is not installed.
        machine: Processor, cores that the process may use, and GPUs.
        system: Operating system.
    """

    package: str
    commit: str | None
    python: str
    packages: dict[str, str | None]
    machine: str
    system: str


class OriginFile(StoredFile):
    """origin.json: the program and machine of a cell's last attempt.

    Attributes:
        origin: The program and machine.
    """

    NAME = "origin.json"
    origin: Origin


class Start(TypedJson):
    """One `pause-megatron experiment run`.

    Attributes:
        begun: Start, seconds since the epoch.
        command: Its arguments.
        grid: The grid's file as it was given.
        grid_sha256: SHA-256 of that file's bytes, in hexadecimal digits.
        origin: The program and the machine that it was started on.
        declared_sha256: SHA-256 of the pre-declaration; None without one.
    """

    begun: Number
    command: tuple[str, ...]
    grid: str
    grid_sha256: str
    origin: Origin
    declared_sha256: str | None = None


class StartsFile(StoredFile):
    """starts.json: every start of an experiment.

    Attributes:
        starts: The starts, oldest first.
    """

    NAME = "starts.json"
    starts: tuple[Start, ...] = ()


@functools.lru_cache(maxsize=1)
def origin() -> Origin:
    """Return this program on this machine."""
    return Origin(
        package=__version__,
        commit=_commit(),
        python=platform.python_version(),
        packages={name: installed_version(name) for name in PACKAGES},
        machine=_machine(),
        system=platform.platform(terse=True),
    )


def record_start(directory: Path, command: Sequence[str], grid_file: Path) -> None:
    """Append this start to DIR/starts.json, after `keep_declaration`.

    Args:
        directory: Folder of the experiment.
        command: Arguments of the command line.
        grid_file: File of the grid.
    """
    earlier = (StartsFile.read_if_present(directory) or StartsFile()).starts
    declared = directory / DECLARED
    start = Start(
        begun=time.time(),
        command=tuple(command),
        grid=str(grid_file),
        grid_sha256=sha256(grid_file),
        origin=origin(),
        declared_sha256=sha256(declared) if declared.exists() else None,
    )
    StartsFile(starts=(*earlier, start)).write(directory)


def keep_declaration(directory: Path, declared: Path | None) -> None:
    """Copy the grid's pre-declaration to DIR, where it never changes again.

    Args:
        directory: Folder of the experiment.
        declared: File of the pre-declaration; None without one.

    Raises:
        ConfigError: It is no declaration, or another one than at an earlier start.
    """
    copy = directory / DECLARED
    if declared is None:
        if copy.exists():
            raise ConfigError(f"declared: expected the pre-declaration of the earlier start ({copy}), got none")
        return
    read_declaration(declared)
    if not copy.exists():
        write_whole(copy, declared.read_bytes())
    elif sha256(copy) != sha256(declared):
        raise ConfigError(
            f"declared: expected the file of the earlier start (SHA-256 {sha256(copy)}), got {declared} (SHA-256 "
            f"{sha256(declared)}); a changed declaration is another experiment: give another --output"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _commit() -> str | None:
    """Return the commit of the repository that holds the package; None without git or without a repository."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(package)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changes = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if changes.strip() else "")


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([f"{_processor()} ({cores} cores)", *_gpus()])


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Return the GPUs of this machine as ["8 x NVIDIA H100"]."""
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    names = re.findall(r"^GPU \d+: (.+?) \(UUID", listed, flags=re.MULTILINE)
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
