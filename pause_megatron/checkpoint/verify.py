"""The files of one checkpoint against its manifest, by one process, for verbs that read a checkpoint whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.store import file_problem
from pause_megatron.errors import CheckpointError

Report = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


def check_files(folder: Path, report: Report) -> Manifest:
    """Reads every file that the manifest names and compares sizes and digests.

    Args:
        folder: a checkpoint
        report: told how far it is

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file is missing, altered, or lies outside the folder (a symbolic link); all are named.
    """
    manifest = Manifest.load(folder)
    total, done, problems = sum(entry.bytes for entry in manifest.files.values()), 0, []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{path}: a link out of the checkpoint")
        elif problem := file_problem(path, entry):
            problems.append(problem)
        done += entry.bytes
        report("checking digests", done, total)
    if problems:
        raise CheckpointError(f"{folder}: the checkpoint is damaged:\n  " + "\n  ".join(problems))
    return manifest
