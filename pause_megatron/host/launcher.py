"""End of a rank together with its launcher: torchrun, deepspeed, srun, mpirun, or the process that a variable names.

Ranks outlive a killed launcher: torchrun starts them in sessions of their own, DeepSpeed's runner starts a launcher
that starts the ranks, and under SLURM they are children of a daemon. They would hang in a collective, or keep training
without a launcher, and keep the lock on the run folder. So a small process (`host/processes.py`) watches each rank's
launcher.

A parent process counts as the launcher only if its variables or command line show that it is one. A run in the
background of a shell continues when the shell ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

from pause_megatron.host import processes
from pause_megatron.host.launcher_search import VARIABLE, find
from pause_megatron.host.processes import GONE, STOP_ASKED, TAKING_STEPS, Watched
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import subprocess


class _WatcherChannel:
    """This process's end of the channel to its watcher; it sends nothing where there is no watcher."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = False
        self.watched = Watched({}, {})

    def begin(self) -> None:
        if self._channel is not None or not sys.executable:
            return
        found = find()
        if found.gone:
            gone = ", ".join(found.gone)
            text = f"the launcher has exited: {gone}; stopping (set {VARIABLE}=0 to continue without it)"
            log.error(text)
            os._exit(1)
        if not found.processes and not found.listeners:
            return
        try:
            self._start(Watched(found.processes, found.listeners))
        except OSError as error:
            log.warning(f"cannot watch the launcher, so this process may outlive it: {error}", extra=EVERY_RANK)

    def _start(self, watched: Watched) -> None:
        import subprocess

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            arguments = processes.watcher_arguments(watched, theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", processes.__file__, *arguments],
                # Without the rank's variables, by which it would count as a rank.
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        self._channel, self.watched = ours, watched

    def send(self, message: bytes) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # the watcher has ended
                self._channel.send(message)

    def gone(self) -> bool:
        if self._channel is not None and not self._gone:
            with contextlib.suppress(OSError):
                self._gone = GONE in self._channel.recv(16)
        return self._gone


_own = _WatcherChannel()


def end_with_launcher() -> None:
    """Start the watcher: from now on this process is killed when its launcher ends.

    It is called first of all, since the following imports may take minutes. A process without a launcher is not
    watched.

    Raises:
        ConfigError: See `find`.
    """
    _own.begin()


def taking_steps() -> None:
    """Notify the watcher that training has begun: it then requests a stop (`gone`), and kills some seconds later."""
    _own.send(TAKING_STEPS)


def stop_was_asked() -> None:
    """Notify the watcher that a signal requested a stop, so that a save has more time. For signal handlers."""
    _own.send(STOP_ASKED)


def gone() -> bool:
    """Return whether the launcher has ended, without blocking."""
    return _own.gone()


def left(code: int) -> int:
    """Exit at once with this code where the launcher has ended; return the code otherwise.

    torchrun's store lives in torchrun. Closing torch's connections to it at interpreter exit takes longer than the
    watcher waits.

    Args:
        code: Exit code.
    """
    if gone():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def own_name() -> str:
    """Return the value of PAUSE_MEGATRON_LAUNCHER_PID for processes that must end with this one."""
    return f"{os.getpid()}@{processes.machine()}"


def watched() -> Watched:
    """Return the watched launcher processes; empty for a process without a launcher or a watcher."""
    return _own.watched
