"""A rank ends with what started it: torchrun, deepspeed, srun, mpirun, or the process that a variable names.

Ranks outlive a launcher that is killed: torchrun gives them sessions of their own, DeepSpeed's runner starts a launcher
that starts the ranks, under SLURM they are children of a daemon. They would then wait for each other, or go on with
nobody to stop them, and keep the run folder. So a small process (`host/processes.py`) watches for each rank.

What started a rank is not taken for its launcher without a sign: a run that is put into the background of a shell goes
on when the shell ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys

from pause_megatron.host import processes
from pause_megatron.host.launcher_search import VARIABLE, find
from pause_megatron.host.processes import GONE, STOP_ASKED, TAKING_STEPS, Watched
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)


class _Watch:
    """This process's end of the channel to its watcher; says nothing where there is none."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process = None
        self._gone = False
        self.watched = Watched({}, {})

    def begin(self) -> None:
        if self._channel is not None or not sys.executable:
            return
        found = find()
        if found.gone:
            text = f"its launcher is gone: {', '.join(found.gone)}; ended ({VARIABLE}=0 lets it go on without)"
            log.error(text)
            os._exit(1)
        if not found.processes and not found.listeners:
            return
        try:
            self._start(Watched(found.processes, found.listeners))
        except OSError as error:
            log.warning(f"this process is not ended with its launcher: {error}", extra=EVERY_RANK)

    def _start(self, watched: Watched) -> None:
        import subprocess

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            arguments = processes.watcher_arguments(watched, theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", processes.__file__, *arguments],
                # None of the rank's variables, by which it would be taken for a rank.
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        self._channel, self.watched = ours, watched

    def tell(self, what: bytes) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it was ended by somebody
                self._channel.send(what)

    def gone(self) -> bool:
        if self._channel is not None and not self._gone:
            with contextlib.suppress(OSError):
                self._gone = GONE in self._channel.recv(16)
        return self._gone


_own = _Watch()


def end_with_launcher() -> None:
    """From now on this process ends when its launcher does: at once, as long as it takes no steps.

    Called first of all, as what is imported next may take minutes. Nothing happens to a process without a launcher.

    Raises:
        ConfigError: see `find`.
    """
    _own.begin()


def taking_steps() -> None:
    """From now on this process has something to lose: it is asked to stop (`gone`), and ended some seconds later."""
    _own.tell(TAKING_STEPS)


def stop_was_asked() -> None:
    """A signal has asked for a stop; should the launcher have gone with it, the save has more time. For handlers."""
    _own.tell(STOP_ASKED)


def gone() -> bool:
    """Whether the launcher has ended. Does not wait."""
    return _own.gone()


def left(code: int) -> int:
    """End this process with its exit code if its launcher has ended, when there is nothing more to do; else the code.

    torchrun's store lives in torchrun. What torch has open there is given up when the interpreter ends, and then takes
    longer than this process may live.
    """
    if gone():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def own_name() -> str:
    """The value of PAUSE_MEGATRON_LAUNCHER_PID for processes that shall end with this one."""
    return f"{os.getpid()}@{processes.machine()}"


def watched() -> Watched:
    """What must stay for this process to go on; empty for one that no launcher started, or that is not watched."""
    return _own.watched
