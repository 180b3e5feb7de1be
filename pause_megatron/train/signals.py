"""Being asked to stop, by a signal or by the clock: a flag that every rank looks at in each step, and all add up."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from types import FrameType

from pause_megatron.errors import ConfigError

# Not SIGUSR1: NCCL takes it for itself.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Set by SIGTERM or SIGUSR2; while steps are taken also by SIGINT and by a deadline. Use as a context.

    The step, validation or save under way is finished, then a checkpoint of the last step is saved, unless there is
    one. Further signals change nothing: a save is ended by SIGKILL alone.

    Attributes:
        reason: why; None as long as nobody asked
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deadline: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = "the job's time is nearly over"
        return self.reason is not None

    @contextlib.contextmanager
    def during_steps(self, deadline: float | None) -> Iterator[None]:
        """While the body runs, SIGINT and the clock ask too. (Before, Ctrl-C ends a program that has nothing to lose.)

        Args:
            deadline: seconds since the epoch; the step that is being taken then is the last one; None: no deadline
        """
        self._deadline = deadline
        before = signal.signal(signal.SIGINT, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._deadline = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"{self.reason}: finishing the step, then saving\n".encode())


@contextlib.contextmanager
def listening_to_the_end() -> Iterator[StopRequest]:
    """For a program that ends after the run. What comes later is ignored: it must not change the exit code."""
    with StopRequest() as stop:
        try:
            yield stop
        finally:
            for number in STOP_SIGNALS:
                stop._before[number] = signal.SIG_IGN


def listening(stop: StopRequest | None) -> contextlib.AbstractContextManager[StopRequest]:
    """The request itself where there is one, else a new one that listens while the body runs."""
    return StopRequest() if stop is None else contextlib.nullcontext(stop)


def deadline(before_end_seconds: int, environment: Mapping[str, str] | None = None) -> float | None:
    """When a run must stop for its job to end in time: `before_end_seconds` before SLURM_JOB_END_TIME.

    Returns:
        Seconds since the epoch; None for 0 seconds, or where the variable is not set.

    Raises:
        ConfigError: the variable is not a number, or that moment is over: the job would come back again and again
            without a step.
    """
    end = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME")
    if not end or not before_end_seconds:
        return None
    try:
        left = float(end) - time.time()
    except ValueError:
        raise ConfigError(
            f"environment variable SLURM_JOB_END_TIME: expected seconds since 1970, came {end!r}"
        ) from None
    if left <= before_end_seconds:
        raise ConfigError(
            f"checkpoint.before_end_seconds={before_end_seconds}: expected less than the job's time, of which "
            f"{max(left, 0):.0f} s are left (SLURM_JOB_END_TIME): no step could begin. Ask for more time, or lower "
            "the key if a step and a save take less"
        )
    return float(end) - before_end_seconds
