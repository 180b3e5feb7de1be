"""Stop requests: a flag that signals and the end of the job's time set, and that every rank reads in each step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from pause_megatron.errors import ConfigError
from pause_megatron.host import launcher
from pause_megatron.terminal.output import write_from_handler

# Not SIGUSR1: NCCL uses it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopRequest:
    """A request to stop, set by STOP_SIGNALS and SIGPIPE; during the steps also by SIGINT and by a deadline.

    A context manager: signal handlers are installed while its body runs. True when a stop is requested.

    SIGHUP (a terminal that is closed) is left alone where it is ignored, as under nohup. A SIGPIPE that another process
    sends is a request; one that a failed write to a pipe raises is not (see `_SentPipeSignals`).

    The step or save in progress is finished and a validation is ended early, then a checkpoint of the last step is
    saved, unless there is one. Further signals change nothing: only SIGKILL ends a save.

    Attributes:
        reason: Why a stop is requested; None: none is.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deadline: float | None = None
        self._before: dict[signal.Signals, _Handler] = {}
        self._pipe_signals = _SentPipeSignals(self._receive)

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._pipe_signals.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe_signals.stop()
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = "the job's time is nearly over"
        if self.reason is None and launcher.gone():
            self.reason = "the launcher has exited"
        return self.reason is not None

    @contextlib.contextmanager
    def during_steps(self, deadline: float | None) -> Iterator[None]:
        """Accept SIGINT and a deadline as requests while the body runs.

        Before the steps, Ctrl-C ends the process.

        Args:
            deadline: Seconds since the epoch; the step in progress at that time is the last one. None: no deadline.
        """
        self._deadline = deadline
        launcher.taking_steps()
        before, entered = signal.signal(signal.SIGINT, self._receive), bool(self._before)
        try:
            yield
        finally:
            self._deadline = None
            if entered:
                # Until the context is left: a second Ctrl-C must not change the exit code of a run that has saved.
                self._before.setdefault(signal.SIGINT, before)
            else:
                signal.signal(signal.SIGINT, before)

    def ignore_signals_on_exit(self) -> None:
        """Leave the signals ignored when the context is left, instead of restoring their handlers."""
        for number in self._before:
            self._before[number] = signal.SIG_IGN

    def _receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            launcher.stop_was_asked()
            write_from_handler(f"{self.reason}: finishing the step, then saving")


class _SentPipeSignals:
    """Receiver of SIGPIPE from other processes, and not from failed writes. Start and stop it in the main thread.

    The signal of a failed write goes to the thread that wrote; one that is sent goes to any thread of the process. So
    it is blocked in the main thread and in those that it starts, where that of a failed write has no effect (Python
    ignores it anyway), and a thread waits for those of the process.
    """

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive = receive
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._mask: set[int | signal.Signals] = set()

    def start(self) -> None:
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE}))
        self._done.clear()
        self._thread = threading.Thread(target=self._wait, name="SIGPIPE", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None and self._thread.ident is not None:
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
def stop_signals_until_exit() -> Iterator[StopRequest]:
    """Handle stop signals in a process that ends after the run; later ones are ignored, to keep the exit code.

    Yields:
        The request, whose signal handlers are installed.
    """
    with StopRequest() as stop:
        try:
            yield stop
        finally:
            stop.ignore_signals_on_exit()


def stop_signals(stop: StopRequest | None) -> contextlib.AbstractContextManager[StopRequest]:
    """Return a context with a stop request whose signal handlers are installed: the given one, else a new one.

    Args:
        stop: A request whose context is entered already, or None.
    """
    return StopRequest() if stop is None else contextlib.nullcontext(stop)


def deadline(before_end_seconds: int, environment: Mapping[str, str] | None = None) -> float | None:
    """Return when a run must stop for its job to end in time: `before_end_seconds` before SLURM_JOB_END_TIME.

    Args:
        before_end_seconds: `checkpoint.before_end_seconds`; 0: no deadline.
        environment: Environment variables; None: those of this process.

    Returns:
        Seconds since the epoch; None: no deadline.

    Raises:
        ConfigError: The variable is not a number; or that time is over, so that the job would be requeued again and
            again without a step.
    """
    end = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME")
    if not end or not before_end_seconds:
        return None
    try:
        left = float(end) - time.time()
    except ValueError:
        raise ConfigError(
            f"environment variable SLURM_JOB_END_TIME: expected seconds since 1970, got {end!r}"
        ) from None
    if left <= before_end_seconds:
        raise ConfigError(
            f"checkpoint.before_end_seconds={before_end_seconds}: expected less than the job's time, of which "
            f"{max(left, 0):.0f} s are left (SLURM_JOB_END_TIME): no step could begin. Ask for more time, or lower "
            "the key if a step and a save take less"
        )
    return float(end) - before_end_seconds
