"""The folder of a run's checkpoints: publishing, choosing the newest complete one, and deleting old ones."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.verify import Complete, first_complete, problems_of
from pause_megatron.distributed.collective import broadcast_object
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import symlink_atomic, sync_folder
from pause_megatron.run_folder import (
    LATEST,
    MANIFEST,
    SET_ASIDE,
    Choice,
    choose,
    choose_in,
    is_copy,
    last_published,
    record_published,
    step_name,
    steps_in,
)
from pause_megatron.terminal.progress import Report, no_report

log = logging.getLogger(__name__)

T = TypeVar("T")

_HIDDEN = ".incoming-"
_LEAST_KEPT = 2
_Stamp = tuple[tuple[str, int, int, int], ...]
"""Path, size in bytes, modification time and inode of each file of a checkpoint."""


class Resumable(NamedTuple):
    """The checkpoint that a run resumes from.

    Attributes:
        folder: Folder of the checkpoint.
        manifest: Its manifest.
        notes: Lines about checkpoints that were passed over.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]


class Store:
    """The folder `RUN/checkpoints/`.

    Args:
        folder: Path of the folder; created by the first save.
        rank: Rank of this process; only rank 0 renames and deletes.
        world_size: Number of ranks.
    """

    def __init__(self, folder: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = Path(folder)
        self._rank, self._world_size = rank, world_size
        self._resumed: tuple[int, Path] | None = None  # step and folder, until the first save
        self._not_moved: set[int] = set()  # on rank 0: steps that could not be set aside
        # On rank 0: stamp and applied optimizer steps (None: damaged) of each verified checkpoint. It is not read again
        # while its stamp stays.
        self._verified: dict[int, tuple[_Stamp, int | None]] = {}

    def steps(self) -> list[int]:
        """Return the steps of the published checkpoints, ascending. Only complete ones are published."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / step_name(step)

    def begin(self, step: int) -> Path:
        """Create an empty hidden folder for a save, and delete those of killed saves. Rank 0 only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.hidden(step).mkdir()
        return self.hidden(step)

    def hidden(self, step: int) -> Path:
        """Return the folder that a save of a step writes to until it is complete."""
        return self.folder / f"{_HIDDEN}{step:08d}"

    def publish(self, hidden: Path, step: int) -> Path:
        """Give a complete, synced folder its final name. Rank 0 only.

        Checkpoints that were passed over when the run resumed (rolled back, or damaged) are renamed first. Nothing is
        deleted.

        Args:
            hidden: The folder.
            step: Its step.

        Returns:
            The folder under its final name.
        """
        if self._resumed is not None:
            self._set_aside_newer(*self._resumed)
        final = self.path(step)
        if os.path.lexists(final):
            self._set_aside(final)
        os.rename(hidden, final)
        self._resumed = None
        self._remember(step, complete=True)
        return final

    def move_latest(self, step: int) -> None:
        """Point `latest` at a published checkpoint. Rank 0 only.

        Args:
            step: Step of the checkpoint.

        Raises:
            OSError: `latest` cannot be moved. The rule of `run_folder` finds the newest checkpoint all the same.
        """
        sync_folder(self.folder)
        latest = self.folder / LATEST
        if is_copy(latest):
            self._set_aside(latest)
        symlink_atomic(latest, step_name(step))
        # Not the step itself: where newer ones could not be set aside, `latest` must still count as moved back.
        record_published(self.folder, self.steps()[-1])

    def prune(self, newest: int, keep: int) -> None:
        """Delete all but the newest `keep` complete checkpoints, from step `newest` down. Every rank calls this.

        The newest and the complete one before it are always kept. A checkpoint with as many applied optimizer steps
        as another has the same weights and does not count: skipped steps alone delete nothing. Damaged checkpoints do
        not count either; they are logged, and deleted together with the complete ones around them. The manifest is
        deleted first, so that a partly deleted checkpoint is not taken for a complete one.

        Args:
            newest: Step of the newest checkpoint.
            keep: Number of complete checkpoints that are kept.
        """
        kept: list[int] = []  # applied optimizer steps
        deleted: list[int] = []
        # Newer ones are there where they could not be set aside.
        steps = _from_rank_zero(
            self._rank, lambda: [step for step in self.steps() if step <= newest and step not in self._not_moved]
        )
        for step in reversed(steps):
            enough = len(kept) >= _LEAST_KEPT and len(set(kept)) >= keep
            applied = None if enough else self._applied_in(step)
            if enough or (applied in kept and len(kept) >= _LEAST_KEPT):
                deleted.append(step)
            elif applied is not None:
                kept.append(applied)
        if self._rank == 0:
            for step in deleted:
                self._delete(self.path(step))

    def newest_complete(self, report: Report = no_report) -> Resumable | None:
        """Return the checkpoint to resume from, by the rule of `run_folder`. Every rank calls this; all get the same.

        Args:
            report: Progress callback of this rank.

        Returns:
            None where there is no checkpoint.

        Raises:
            NewerFormatError: A newer release wrote it.
            CheckpointError: There are checkpoints, and none of them is complete.
        """
        choice = _from_rank_zero(self._rank, lambda: choose_in(self.folder))
        if not choice.folders:
            return None
        found = first_complete(choice.folders, rank=self._rank, world_size=self._world_size, report=report)
        self._resumed = found.manifest.step, found.folder
        if self._rank == 0 and found.folder.name == step_name(found.manifest.step):
            self._remember(found.manifest.step, complete=True)
        return Resumable(found.folder, found.manifest, _notes(choice, found))

    def verify(self, folder: Path) -> list[str]:
        """Return what is wrong with a checkpoint, one line a file; empty for a complete one. Every rank calls this."""
        return problems_of(folder, rank=self._rank, world_size=self._world_size)

    def _applied_in(self, step: int) -> int | None:
        """Return the applied optimizer steps of a checkpoint, None where it is damaged. Every rank calls this.

        The checkpoint is read only where it was modified since this process has written or verified it.
        """
        known = self._verified.get(step) if self._rank == 0 else None
        if broadcast_object(known is not None and known[0] == self._stamp(step)):
            return broadcast_object(None if known is None else known[1])
        problems = self.verify(self.path(step))
        if self._rank != 0:
            return broadcast_object(None)
        for problem in problems:
            log.warning(f"damaged, does not count towards checkpoint.keep: {problem}")
        return broadcast_object(self._remember(step, complete=not problems))

    def _remember(self, step: int, *, complete: bool) -> int | None:
        """Remember the stamp and the applied optimizer steps of a verified checkpoint. Rank 0 only."""
        applied = None
        with contextlib.suppress(CheckpointError):
            applied = Manifest.load(self.path(step)).optimizer_step if complete else None
        self._verified[step] = self._stamp(step), applied
        return applied

    def _stamp(self, step: int) -> _Stamp:
        """Return a value that changes when a file of the checkpoint is written to."""
        stamps = []
        try:
            for path in sorted(self.path(step).rglob("*")):
                status = path.stat()
                stamps.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
        except OSError as error:
            stamps.append((str(error), 0, 0, 0))
        return tuple(stamps)

    def _set_aside_newer(self, resumed: int, folder: Path) -> None:
        """Rename the checkpoints that are newer than the one resumed from; publish a copy in the place of `latest`.

        A checkpoint that cannot be renamed (another user's) stays, with a warning: the rule finds the others all the
        same.
        """
        for step in self.steps():
            if step > resumed:
                try:
                    self._set_aside(self.path(step))
                except OSError as error:
                    self._not_moved.add(step)
                    self._warn_not_moved(error)
        try:
            if is_copy(self.folder / LATEST) and folder == (self.folder / LATEST).resolve():
                if os.path.lexists(self.path(resumed)):
                    self._set_aside(self.path(resumed))
                os.rename(self.folder / LATEST, self.path(resumed))
            published = last_published(self.folder)
            if published is not None and published > resumed and not self._not_moved:
                record_published(self.folder, resumed)  # the roll-back is done; the newest counts again
        except OSError as error:
            self._warn_not_moved(error)

    def _warn_not_moved(self, error: OSError) -> None:
        log.warning(f"cannot rename a skipped checkpoint: {error}")

    def _set_aside(self, folder: Path) -> None:
        number, target = 1, self.folder / f"{SET_ASIDE}{folder.name}"
        while os.path.lexists(target):
            number += 1
            target = self.folder / f"{SET_ASIDE}{folder.name}.{number}"
        os.rename(folder, target)
        log.info(f"skipped {folder}; renamed to {target}")

    def _delete(self, folder: Path) -> None:
        if folder.is_symlink():
            folder.unlink()
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def open_newest(path: str | Path, *, rank: int = 0, world_size: int = 1, report: Report = no_report) -> Complete:
    """Return the newest complete checkpoint at a path. Every rank calls this; rank 0 logs what was passed over.

    Args:
        path: A checkpoint, `.../latest`, `RUN/checkpoints` or `RUN`.
        rank: Rank of this process. The verification is distributed over the ranks.
        world_size: Number of ranks.
        report: Progress callback of this rank.

    Raises:
        CheckpointError: There is no checkpoint, or none is complete.
    """
    choice = _from_rank_zero(rank, lambda: choose(path))
    if not choice.folders:
        raise CheckpointError(f"{path}: expected a checkpoint (a folder with {MANIFEST}) or a run folder, got neither")
    found = first_complete(choice.folders, rank=rank, world_size=world_size, report=report)
    if rank == 0:
        for line in _notes(choice, found):
            log.warning(line)
    return found


def _from_rank_zero(rank: int, list_folder: Callable[[], T]) -> T:
    """Return on every rank what rank 0 sees in a folder: on a network file system others may see an older state."""
    outcome: tuple[T] | str = ""  # the result, or why there is none
    if rank == 0:
        try:
            outcome = (list_folder(),)
        except OSError as error:
            outcome = f"{error.filename}: {error.strerror}"
    outcome = broadcast_object(outcome)
    if isinstance(outcome, str):
        raise CheckpointError(outcome)
    return outcome[0]


def _notes(choice: Choice, found: Complete) -> tuple[str, ...]:
    notes = (choice.note,) if choice.note else ()
    return (*notes, *(f"passed over: {complaint}" for complaint in found.complaints))
