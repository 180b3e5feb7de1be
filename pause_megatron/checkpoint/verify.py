"""A checkpoint read whole against its manifest, by one process or by all ranks together."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.checkpoint.manifest import FileEntry, Manifest, NewerFormatError
from pause_megatron.checkpoint.reader import CheckpointReader, not_finite
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import digest_of

Report = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True)
class Complete:
    """A complete checkpoint.

    Attributes:
        folder: where
        manifest: what it says of itself
        complaints: about those that were passed over before it, one line a file
    """

    folder: Path
    manifest: Manifest
    complaints: tuple[str, ...]


def no_report(stage: str, done: int, total: int) -> None:
    """A Report that tells nobody."""


def first_complete(
    folders: Sequence[Path], *, rank: int = 0, world_size: int = 1, report: Report = no_report
) -> Complete:
    """The first of these checkpoints in which nothing is wrong. Every rank calls this with the same folders.

    Args:
        folders: in the order in which they are tried; at least one
        rank, world_size: the reading is shared out among the ranks
        report: told how far this rank is

    Raises:
        NewerFormatError: one that comes before was written by a newer release.
        CheckpointError: every one is damaged; what is wrong is named.
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
    """What is wrong with a checkpoint, one line a file, the same on every rank; empty when nothing is.

    Sizes and digests of all files; that state files hold each element of each parameter once, in fp32, finite.
    Arguments and NewerFormatError as in `first_complete`.
    """
    newer, found = "", []
    try:
        manifest = Manifest.load(folder)
        names = list(manifest.files)[rank::world_size]
        found = _file_problems(folder, manifest, names, report)
        if not found:  # what is damaged is not looked into
            found = _state_problems(folder, manifest, range(rank, manifest.tensor_parallel, world_size))
    except NewerFormatError as error:
        newer = str(error)
    except CheckpointError as error:
        found = [str(error)]
    everywhere = gather_objects((newer, found))
    if newer := max(text for text, _ in everywhere):
        raise NewerFormatError(newer)
    return sorted({problem for _, problems in everywhere for problem in problems})


def _file_problems(folder: Path, manifest: Manifest, names: Sequence[str], report: Report) -> list[str]:
    total, done, problems = sum(manifest.files[name].bytes for name in names), 0, []
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{path}: a link out of the checkpoint")
        elif problem := file_problem(path, manifest.files[name]):
            problems.append(problem)
        elif name.endswith(".safetensors") and "/" not in name:
            problems += _values_problems(path)
        done += manifest.files[name].bytes
        report("checking digests", done, total)
    return problems


def _values_problems(path: Path) -> list[str]:
    try:
        return not_finite(path)
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
    """What is wrong with a file whose size and digest are known; None when nothing is."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            return f"{path}: expected a file, found something else of that name"
        if status.st_size != entry.bytes:
            return f"{path}: expected {entry.bytes} bytes, found {status.st_size}"
        if digest_of(path) != entry.digest:
            return f"{path}: its digest is not the manifest's; the file was altered after it was written"
    except (OSError, ValueError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    return None
