"""Being asked to stop, by a signal or by the clock: a flag that every rank looks at in each step, and all add up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from pause_megatron.errors import ConfigError
from pause_megatron.host import launcher
from pause_megatron.terminal.output import write_from_handler

# Not SIGUSR1: NCCL takes it for itself.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Set by STOP_SIGNALS and SIGPIPE; while steps are taken also by SIGINT and by a deadline. Use as a context.

    SIGHUP (a terminal that is closed) is left alone where it is ignored, as under nohup. SIGPIPE asks where somebody
    sends it; one that comes of writing to a pipe without a reader does not (see `_PipeSignals`).

    The step, validation or save under way is finished, then a checkpoint of the last step is saved, unless there is
    one. Further signals change nothing: a save is ended by SIGKILL alone.

    Attributes:
        reason: why; None as long as nobody asked
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deadline: float | None = None
        self._before: dict[signal.Signals, object] = {}
        self._pipe_signals = _PipeSignals(self._receive)

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._pipe_signals.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe_signals.__exit__(*exception)
        while self._before:
            signal.signal(*self._before.popitem())

    def __bool__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = "the job's time is nearly over"
        if self.reason is None and launcher.gone():
            self.reason = "its launcher is gone"
        return self.reason is not None

    @contextlib.contextmanager
    def during_steps(self, deadline: float | None) -> Iterator[None]:
        """While the body runs, SIGINT and the clock ask too. (Before, Ctrl-C ends a program that has nothing to lose.)

        Args:
            deadline: seconds since the epoch; the step that is being taken then is the last one; None: no deadline
        """
        self._deadline = deadline
        launcher.taking_steps()
        before, entered = signal.signal(signal.SIGINT, self._receive), bool(self._before)
        try:
            yield
        finally:
            self._deadline = None
            if entered:
                # Until the request is left: a second Ctrl-C must not change the exit code of a run that has saved.
                self._before.setdefault(signal.SIGINT, before)
            else:
                signal.signal(signal.SIGINT, before)

    def _receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            launcher.stop_was_asked()
            write_from_handler(f"{self.reason}: finishing the step, then saving")


class _PipeSignals:
    """Tells a SIGPIPE that somebody sent from those that failed writes raise. Use as a context, in the main thread.

    The signal of a failed write goes to the thread that wrote; one that is sent goes to the process, to whichever
    thread takes it. So it is blocked in this thread and in those that it starts, where that of a failed write stays
    without effect (Python ignores it anyway), and a thread waits for those of the process.
    """

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive = receive
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        self._done.clear()
        self._thread = threading.Thread(target=self._wait, name="SIGPIPE", daemon=True)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        signal.pthread_kill(self._thread.ident, signal.SIGPIPE)
        self._thread.join()
        if signal.SIGPIPE not in self._mask:
            while signal.sigtimedwait({signal.SIGPIPE}, 0):  # of failed writes of this thread
                pass
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})

    def _wait(self) -> None:
        while True:
            signal.sigwait({signal.SIGPIPE})
            if self._done.is_set():
                return
            self._receive(signal.SIGPIPE)


@contextlib.contextmanager
def listening_to_the_end() -> Iterator[StopRequest]:
    """For a program that ends after the run. What comes later is ignored: it must not change the exit code."""
    with StopRequest() as stop:
        try:
            yield stop
        finally:
            for number in stop._before:
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
