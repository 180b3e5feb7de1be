"""Verifying checkpoints: every file against its size and digest, every tensor for gaps and non-finite values."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.checkpoint.format import is_state_file
from pause_megatron.checkpoint.manifest import FileEntry, Manifest, NewerFormatError
from pause_megatron.checkpoint.reader import CheckpointReader, state_file_faults
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.errors import CheckpointError
from pause_megatron.files.digest import file_digest
from pause_megatron.terminal.progress import Report, no_report


@dataclass(frozen=True)
class Complete:
    """A complete checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        manifest: Its manifest.
        complaints: What is wrong with the checkpoints that were passed over before it, one line a file.
    """

    folder: Path
    manifest: Manifest
    complaints: tuple[str, ...]


def first_complete(
    folders: Sequence[Path], *, rank: int = 0, world_size: int = 1, report: Report = no_report
) -> Complete:
    """Return the first of these checkpoints that is complete. Every rank calls this with the same folders.

    Args:
        folders: Checkpoints in the order in which they are tried; at least one.
        rank: Rank of this process. The files are distributed over the ranks.
        world_size: Number of ranks.
        report: Progress callback of this rank.

    Raises:
        NewerFormatError: A newer release wrote one that comes before.
        CheckpointError: Every one is damaged; the message says what is wrong with each.
    """
    complaints: list[str] = []
    for folder in folders:
        problems = problems_of(folder, rank=rank, world_size=world_size, report=report)
        if not problems:
            return Complete(folder, Manifest.load(folder), tuple(complaints))
        complaints += problems
    what = f"{folders[0]}: the checkpoint is damaged" if len(folders) == 1 else "every checkpoint is damaged"
    raise CheckpointError(f"{what}:\n  " + "\n  ".join(complaints))


def problems_of(folder: Path, *, rank: int = 0, world_size: int = 1, report: Report = no_report) -> list[str]:
    """Return what is wrong with a checkpoint, one line a file, the same on every rank; empty for a complete one.

    Checks the size and digest of each file, and that the state files hold each element of each parameter once, in
    fp32, finite. Every rank calls this.

    Args:
        folder: The checkpoint.
        rank: Rank of this process. The files are distributed over the ranks.
        world_size: Number of ranks.
        report: Progress callback of this rank.

    Raises:
        NewerFormatError: A newer release wrote it.
    """
    newer, problems = "", []
    try:
        manifest = Manifest.load(folder)
        names = list(manifest.files)[rank::world_size]
        problems = _file_problems(folder, manifest, names, report)
        if not problems:  # a damaged file is not parsed
            problems = _state_problems(folder, manifest, range(rank, manifest.tensor_parallel, world_size))
    except NewerFormatError as error:
        newer = str(error)
    except CheckpointError as error:
        problems = [str(error)]
    by_rank = gather_objects((newer, problems))
    if newer := max(text for text, _ in by_rank):
        raise NewerFormatError(newer)
    return sorted({problem for _, found in by_rank for problem in found})


def _file_problems(folder: Path, manifest: Manifest, names: Sequence[str], report: Report) -> list[str]:
    total, done, problems = sum(manifest.files[name].bytes for name in names), 0, []
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{path}: expected a file inside the checkpoint, got a link out of it")
        elif problem := file_problem(path, manifest.files[name]):
            problems.append(problem)
        elif is_state_file(name):
            problems += _values_problems(path)
        done += manifest.files[name].bytes
        report("checking digests", done, total)
    return problems


def _values_problems(path: Path) -> list[str]:
    try:
        return state_file_faults(path)
    except CheckpointError as error:
        return [str(error)]


def _state_problems(folder: Path, manifest: Manifest, tp_ranks: Sequence[int]) -> list[str]:
    problems = []
    for tp_rank in tp_ranks:
        try:
            CheckpointReader(folder, tp_rank).check_whole()
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def file_problem(path: Path, entry: FileEntry) -> str | None:
    """Return what is wrong with a file whose size and digest are known; None where it is intact.

    Args:
        path: The file.
        entry: Its size and digest.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            return f"{path}: expected a regular file, got something else of that name"
        if status.st_size != entry.bytes:
            return f"{path}: expected {entry.bytes} bytes, got {status.st_size}"
        if file_digest(path) != entry.digest:
            return f"{path}: expected the manifest's digest, got another: the file was altered after it was written"
    except (OSError, ValueError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    return None
