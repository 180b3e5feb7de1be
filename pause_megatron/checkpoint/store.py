"""The folder of a run's checkpoints: which are complete, which is newest, which go."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.verify import Complete, Report, first_complete, no_report, problems_of
from pause_megatron.distributed.collective import broadcast_object
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import point, sync_folder
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

log = logging.getLogger(__name__)

T = TypeVar("T")

_HIDDEN = ".incoming-"
_LEAST_KEPT = 2
_Stamp = tuple[tuple[str, int, int, int], ...]


class Store:
    """`RUN/checkpoints/`.

    Args:
        folder: created when something is written to it
        rank, world_size: place among all ranks; rank 0 alone renames and deletes
    """

    def __init__(self, folder: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = Path(folder)
        self._rank, self._world_size = rank, world_size
        # Of this process: what it resumed from; and what the files of checkpoints were like when they were found
        # complete (with so many optimizer steps) or damaged, so that they are not read again while nobody writes them.
        self._resumed: tuple[int, Path] | None = None
        self._left: set[int] = set()  # on rank 0: steps that should have been set aside and could not
        self._verdicts: dict[int, tuple[_Stamp, int | None]] = {}

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have a name, ascending. A name is given only to complete ones."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / step_name(step)

    def begin(self, step: int) -> Path:
        """An empty hidden folder to write into, in place of what a killed save left behind. Rank 0 only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.hidden(step).mkdir()
        return self.hidden(step)

    def hidden(self, step: int) -> Path:
        """Where a save of a step writes until it is complete."""
        return self.folder / f"{_HIDDEN}{step:08d}"

    def publish(self, hidden: Path, step: int) -> Path:
        """Gives a complete, synced folder its name. Rank 0 only.

        What was passed over when the run resumed (rolled back, or damaged) is set aside first, and nothing is deleted.
        """
        if self._resumed is not None:
            self._leave_behind(*self._resumed)
        final = self.path(step)
        if os.path.lexists(final):
            self._set_aside(final)
        os.rename(hidden, final)
        self._resumed = None
        self._judge(step, complete=True)
        return final

    def point_to(self, step: int) -> None:
        """Points `latest` at a checkpoint that has its name. Rank 0 only.

        Raises:
            OSError: it cannot be moved. The rule of `run_folder` finds the newest one all the same.
        """
        sync_folder(self.folder)
        latest = self.folder / LATEST
        if is_copy(latest):
            self._set_aside(latest)
        point(latest, step_name(step))
        # Not below one that could not be set aside: `latest` stays moved back before it.
        record_published(self.folder, self.steps()[-1])

    def prune(self, newest: int, keep: int) -> None:
        """Deletes all but the newest `keep` complete checkpoints, beginning with step `newest`. Every rank calls this.

        The newest and the complete one before it always stay. One without an applied step more than the one before
        it has the same weights, and does not count: steps that were all skipped push out nothing. Damaged ones do not
        count either; they are named, and go when the complete ones around them do. Each loses its manifest first: half
        of one is none.
        """
        kept: list[int] = []  # optimizer steps
        gone: list[int] = []
        # Newer ones, and those that were left, could not be set aside.
        steps = _from_rank_zero(
            self._rank, lambda: [step for step in self.steps() if step <= newest and step not in self._left]
        )
        for step in reversed(steps):
            enough = len(kept) >= _LEAST_KEPT and len(set(kept)) >= keep
            applied = None if enough else self._applied_in(step)
            if enough or (applied in kept and len(kept) >= _LEAST_KEPT):
                gone.append(step)
            elif applied is not None:
                kept.append(applied)
        if self._rank == 0:
            for step in gone:
                self._delete(self.path(step))

    def newest_complete(self, report: Report = no_report) -> tuple[Path, Manifest, tuple[str, ...]] | None:
        """The checkpoint to go on from, by the rule of `run_folder`. Every rank calls this; all return the same.

        Returns:
            (folder, manifest, lines about others that were passed over), or None when there is no checkpoint.

        Raises:
            NewerFormatError: it was written by a newer release.
            CheckpointError: there are checkpoints, and none of them is complete.
        """
        choice = _from_rank_zero(self._rank, lambda: choose_in(self.folder))
        if not choice.folders:
            return None
        found = first_complete(choice.folders, rank=self._rank, world_size=self._world_size, report=report)
        self._resumed = found.manifest.step, found.folder
        if self._rank == 0 and found.folder.name == step_name(found.manifest.step):
            self._judge(found.manifest.step, complete=True)
        return found.folder, found.manifest, _said(choice, found)

    def verify(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, one line a file; empty when nothing is. Every rank calls this."""
        return problems_of(folder, rank=self._rank, world_size=self._world_size)

    def _applied_in(self, step: int) -> int | None:
        """Optimizer steps in a checkpoint; None: it is damaged. Every rank calls this; all return the same.

        It is read only where somebody wrote to it since this process has written or read it.
        """
        known = self._verdicts.get(step) if self._rank == 0 else None
        if broadcast_object(known is not None and known[0] == self._stamp(step)):
            return broadcast_object(known and known[1])
        problems = self.verify(self.path(step))
        if self._rank != 0:
            return broadcast_object(None)
        for problem in problems:
            log.warning(f"damaged, does not count towards checkpoint.keep: {problem}")
        return broadcast_object(self._judge(step, complete=not problems))

    def _judge(self, step: int, *, complete: bool) -> int | None:
        """Remembers what was found out about a checkpoint. Rank 0 only."""
        applied = None
        with contextlib.suppress(CheckpointError):
            applied = Manifest.load(self.path(step)).optimizer_step if complete else None
        self._verdicts[step] = self._stamp(step), applied
        return applied

    def _stamp(self, step: int) -> _Stamp:
        """Names, sizes, times and numbers of the files of a checkpoint: whoever writes to one changes them."""
        stamps = []
        try:
            for path in sorted(self.path(step).rglob("*")):
                status = path.stat()
                stamps.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
        except OSError as error:
            stamps.append((str(error), 0, 0, 0))
        return tuple(stamps)

    def _leave_behind(self, resumed: int, folder: Path) -> None:
        """Sets aside the checkpoints that are newer than the one that the run went on from, and gives that its name.

        One that cannot be moved (another user's) stays, and is said: the rule finds the others all the same.
        """
        for step in self.steps():
            if step > resumed:
                try:
                    self._set_aside(self.path(step))
                except OSError as error:
                    self._left.add(step)
                    self._say_left(error)
        try:
            if is_copy(self.folder / LATEST) and folder == (self.folder / LATEST).resolve():
                if os.path.lexists(self.path(resumed)):
                    self._set_aside(self.path(resumed))
                os.rename(self.folder / LATEST, self.path(resumed))
            published = last_published(self.folder)
            if published is not None and published > resumed and not self._left:
                record_published(self.folder, resumed)  # the roll-back is done: from here on the newest is meant again
        except OSError as error:
            self._say_left(error)

    def _say_left(self, error: OSError) -> None:
        log.warning(f"a checkpoint that was passed over stays where it is: {error}")

    def _set_aside(self, folder: Path) -> None:
        number, target = 1, self.folder / f"{SET_ASIDE}{folder.name}"
        while os.path.lexists(target):
            number += 1
            target = self.folder / f"{SET_ASIDE}{folder.name}.{number}"
        os.rename(folder, target)
        log.info(f"{folder} was passed over: it is {target} now")

    def _delete(self, folder: Path) -> None:
        if folder.is_symlink():
            folder.unlink()
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def open_newest(path: str | Path, *, rank: int = 0, world_size: int = 1, report: Report = no_report) -> Complete:
    """The complete checkpoint that a user means: one itself, `.../latest`, `RUN/checkpoints` or `RUN`.

    Every rank calls this; rank 0 says what was passed over. Arguments as in `first_complete`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    choice = _from_rank_zero(rank, lambda: choose(path))
    if not choice.folders:
        raise CheckpointError(
            f"{path}: expected a checkpoint (a folder with {MANIFEST}) or a run folder, found neither"
        )
    found = first_complete(choice.folders, rank=rank, world_size=world_size, report=report)
    if rank == 0:
        for line in _said(choice, found):
            log.warning(line)
    return found


def _from_rank_zero(rank: int, look: Callable[[], T]) -> T:
    """What rank 0 sees in a folder, on every rank, or why it cannot: others may see an older state of it."""
    seen, failure = None, ""
    if rank == 0:
        try:
            seen = look()
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}"
    seen, failure = broadcast_object((seen, failure))
    if failure:
        raise CheckpointError(failure)
    return seen


def _said(choice: Choice, found: Complete) -> tuple[str, ...]:
    notes = (choice.note,) if choice.note else ()
    return (*notes, *(f"passed over: {complaint}" for complaint in found.complaints))
