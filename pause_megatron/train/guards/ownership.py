"""One job at a time in a run folder, and no lock that outlives its job.

Rank 0 holds a file lock, which goes with its process, and a small file that says whose the folder is (see
`pause_megatron.files.locks`). Where the lock is seen by one machine only (Lustre with `localflock`), or not at all, the
file decides. An owner that was frozen for so long that another job has followed it notices before it writes anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.errors import ConfigError
from pause_megatron.files.durable import file_lock, has_name
from pause_megatron.files.locks import (
    BEAT_SECONDS,
    Backoff,
    HeldError,
    Holding,
    is_here,
    is_orphan,
    name_of,
    read,
    runs,
)
from pause_megatron.host import launcher
from pause_megatron.host.processes import STOPPING_SECONDS
from pause_megatron.terminal.log import EVERY_RANK
from pause_megatron.train.guards.signals import StopRequest
from pause_megatron.train.hooks import Hook
from pause_megatron.train.loop import StepResult

log = logging.getLogger(__name__)

_ENDED_SECONDS = 2.0  # the lock of a process that has just ended is there for a moment
_ORPHAN_SECONDS = STOPPING_SECONDS + 5


class Ownership:
    """What a run knows of its folder being its own. Only rank 0 can look.

    Args:
        folder: of the run
        holding: rank 0's; None on the others
    """

    def __init__(self, folder: Path, holding: Holding | None) -> None:
        self._folder, self._holding = folder, holding

    def require(self) -> None:
        """Every rank calls this before the run writes what others read.

        Raises:
            ConfigError: another job has the folder; it is named. Raised on every rank.
        """
        if other := gather_objects(self._holding.taken_over() if self._holding else "")[0]:
            raise ConfigError(self._lost(other))

    def require_on_this_rank(self) -> None:
        """As `require`, for a rank that can tell the others by itself."""
        if self._holding and (other := self._holding.taken_over()):
            raise ConfigError(self._lost(other))

    def lost_while_away(self) -> bool:
        """Whether another job has the folder since this process was frozen. Cheap enough for every step."""
        return bool(self._holding and self._holding.taken_over_while_away())

    def _lost(self, other: str) -> str:
        return (
            f"run.dir={self._folder}: expected to be the only job there, got another owner, {other}, which took it "
            "over while this one gave no sign of life; nothing more is written"
        )


class WhileOwner:
    """A hook that writes, until another job has the folder; then the run is asked to stop instead.

    Args:
        hook: the hook
        owner: rank 0's
        stop: of the run
    """

    def __init__(self, hook: Hook, owner: Ownership, stop: StopRequest) -> None:
        self._hook, self._owner, self._stop = hook, owner, stop

    def __call__(self, result: StepResult) -> None:
        if self._is_owner():
            self._hook(result)

    def stop(self, result: StepResult) -> None:
        if self._is_owner():
            self._hook.stop(result)

    def close(self) -> None:
        self._hook.close()

    def lost(self) -> str | None:
        """As the hook's."""
        return self._hook.lost()

    def _is_owner(self) -> bool:
        if not self._owner.lost_while_away():
            return True
        self._stop.reason = self._stop.reason or "the run folder has another owner"
        return False


@contextlib.contextmanager
def own_run(folder: Path, context: ParallelContext, beat_seconds: float = BEAT_SECONDS) -> Iterator[Ownership]:
    """While the body runs, no other job may run in the folder. Every rank calls this.

    Args:
        folder: of the run; created
        context: this rank's place
        beat_seconds: between two signs of life

    Raises:
        ConfigError: another job runs there; it is named. Raised on every rank.
    """
    with contextlib.ExitStack() as closing:
        taken = _take(folder, closing, beat_seconds) if context.rank == 0 else None
        if refusal := gather_objects(taken if isinstance(taken, str) else None)[0]:
            raise ConfigError(refusal)
        yield Ownership(folder, taken)


def _take(folder: Path, closing: contextlib.ExitStack, beat_seconds: float) -> Holding | str:
    """Becomes the owner until `closing` is closed, or says who is. One that is about to end is waited for."""
    began, said, backoff = time.monotonic(), False, Backoff(0.1, 0.1)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _take_now(folder, closing, beat_seconds)
        except (BlockingIOError, HeldError):
            record = read(folder / ".owner.json")
        except OSError as error:
            return f"run.dir={folder}: expected a folder to write to: {error}"
        orphan = is_orphan(record)
        if not (orphan or (is_here(record) and not runs(record) and not said)):
            return _refusal(folder, name_of(record) if record else "another process")
        if time.monotonic() > began + (_ORPHAN_SECONDS if orphan else _ENDED_SECONDS):
            return _refusal(folder, f"{name_of(record)}, whose launcher is gone")
        if orphan and not said:
            said = True
            text = f"run.dir={folder}: held by {name_of(record)}, whose launcher is gone; waiting for its end"
            log.info(text, extra=EVERY_RANK)
        backoff.wait()


def _take_now(folder: Path, closing: contextlib.ExitStack, beat_seconds: float) -> Holding:
    lock = folder / ".lock"
    descriptor = file_lock(lock)
    try:
        holding = Holding(folder / ".owner.json", beat_seconds, {"launcher": asdict(launcher.watched())})
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise

    def give_up() -> None:
        mine = holding.close()
        # On a machine that does not see this one's lock, the other owner holds a lock on the very same file.
        if mine and (descriptor is None or has_name(descriptor, lock)):
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)

    closing.callback(give_up)
    return holding


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"run.dir={folder}: expected a folder that no other job runs in, held by {holder}; stop it, or give another "
        "run.dir"
    )
