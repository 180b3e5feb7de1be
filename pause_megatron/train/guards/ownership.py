"""One job per run folder, with a lock that does not outlive its job.

Rank 0 holds a file lock, which ends with its process, and an owner file (see `pause_megatron.files.locks`). Where locks
are visible on one host only (Lustre with `localflock`) or not supported, the owner file decides. An owner that was
frozen for so long that another job took the folder over notices that before it writes anything.
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
from pause_megatron.train.loop import Metrics, StepResult

log = logging.getLogger(__name__)

_ENDED_SECONDS = 2.0  # the lock of a process that has just ended is there for a moment
_ORPHAN_SECONDS = STOPPING_SECONDS + 5


class Ownership:
    """Ownership of the run folder by this job, checked on rank 0.

    Args:
        folder: The run folder.
        holding: The owner file, on rank 0; None on the other ranks.
    """

    def __init__(self, folder: Path, holding: Holding | None) -> None:
        self._folder, self._holding = folder, holding

    def require(self) -> None:
        """Check that the run folder is this job's, before the run writes what others read. Every rank calls this.

        Raises:
            ConfigError: Another job has taken the folder over; it is named. Raised on every rank.
        """
        if other := gather_objects(self._holding.taken_over() if self._holding else "")[0]:
            raise ConfigError(self._taken_over_error(other))

    def require_on_this_rank(self) -> None:
        """Check the same without a collective, where an exception of this rank reaches the others anyway.

        Raises:
            ConfigError: Another job has taken the folder over; raised on rank 0.
        """
        if self._holding and (other := self._holding.taken_over()):
            raise ConfigError(self._taken_over_error(other))

    def lost_while_away(self) -> bool:
        """Return whether another job took the folder over while this process was frozen. Cheap enough for each step."""
        return bool(self._holding and self._holding.taken_over_while_away())

    def _taken_over_error(self, other: str) -> str:
        return (
            f"run.dir={self._folder}: expected to be the only job there, got another owner, {other}, which took it "
            "over while this one gave no sign of life; nothing more is written"
        )


class WhileOwner(Hook):
    """Wrapper of a hook that writes to the run folder; when another job takes the folder over, the run stops.

    Args:
        hook: The hook.
        owner: Ownership of the run folder, on rank 0.
        stop: Stop request of the run.
    """

    def __init__(self, hook: Hook, owner: Ownership, stop: StopRequest) -> None:
        self._hook, self._owner, self._stop = hook, owner, stop

    def __call__(self, result: StepResult) -> Metrics | None:
        """Call the hook."""
        return self._hook(result) if self._is_owner() else None

    def on_stop(self, result: StepResult) -> None:
        """Pass the stop on to the hook."""
        if self._is_owner():
            self._hook.on_stop(result)

    def close(self) -> None:
        """Close the hook."""
        self._hook.close()

    def failure(self) -> str | None:
        """Return the failure of the hook."""
        return self._hook.failure()

    def _is_owner(self) -> bool:
        if not self._owner.lost_while_away():
            return True
        self._stop.reason = self._stop.reason or "the run folder has another owner"
        return False


@contextlib.contextmanager
def own_run(folder: Path, context: ParallelContext, beat_seconds: float = BEAT_SECONDS) -> Iterator[Ownership]:
    """Own the run folder while the body runs: no other job can train in it. Every rank calls this.

    Args:
        folder: The run folder; created where it does not exist.
        context: Process groups of this rank.
        beat_seconds: Interval of heartbeats in the owner file.

    Yields:
        The ownership, which can be lost while this process is frozen.

    Raises:
        ConfigError: Another job trains there; it is named. Raised on every rank.
    """
    with contextlib.ExitStack() as closing:
        holding, failure = _acquire(folder, closing, beat_seconds) if context.rank == 0 else (None, "")
        if failure := gather_objects(failure)[0]:
            raise ConfigError(failure)
        yield Ownership(folder, holding)


def _acquire(folder: Path, closing: contextlib.ExitStack, beat_seconds: float) -> tuple[Holding | None, str]:
    """Own the folder until `closing` is closed, after waiting for an owner that is about to end.

    Returns:
        The owner file; or None and the error that names the other owner.
    """
    began, logged, backoff = time.monotonic(), False, Backoff(0.1, 0.1)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _acquire_now(folder, closing, beat_seconds), ""
        except (BlockingIOError, HeldError):
            record = read(folder / ".owner.json")
        except OSError as error:
            return None, f"run.dir={folder}: expected a folder to write to, got {error}"
        orphan = is_orphan(record)
        if not (orphan or (is_here(record) and not runs(record) and not logged)):
            return None, _held_error(folder, name_of(record) if record else "another process")
        if time.monotonic() > began + (_ORPHAN_SECONDS if orphan else _ENDED_SECONDS):
            return None, _held_error(folder, f"{name_of(record)}, whose launcher is gone")
        if orphan and not logged:
            logged = True
            text = f"run.dir={folder}: held by {name_of(record)}, whose launcher is gone; waiting for its end"
            log.info(text, extra=EVERY_RANK)
        backoff.wait()


def _acquire_now(folder: Path, closing: contextlib.ExitStack, beat_seconds: float) -> Holding:
    lock = folder / ".lock"
    descriptor = file_lock(lock)
    try:
        holding = Holding(folder / ".owner.json", beat_seconds, {"launcher": asdict(launcher.watched())})
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise

    def release() -> None:
        owned = holding.close()
        # On a host that does not see this one's lock, the other owner holds a lock on the same file.
        if owned and (descriptor is None or has_name(descriptor, lock)):
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)

    closing.callback(release)
    return holding


def _held_error(folder: Path, holder: str) -> str:
    return (
        f"run.dir={folder}: expected a folder that no other job runs in, held by {holder}; stop it, or give another "
        "run.dir"
    )
