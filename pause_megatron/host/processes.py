"""Processes of this machine: which one it is, whether it still runs, who started whom; and one that watches others.

The file is also a program, started by `host/launcher.py` with the standard library alone: it imports nothing of the
package. The watcher is a process of its own because a rank's threads do not get to run while an import, a
compiler or a library holds the interpreter's lock, and because a rank may be frozen.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

LOOK_SECONDS = 0.25
SAVE_SECONDS = 8.0
SILENT_SECONDS = 0.75  # Ctrl-C ends launcher and rank alike: the rank's own handler is waited for, which says so
STOPPING_SECONDS = 60.0
_FIRST_NAMESPACE = 0xEFFFFFFC  # the kernel's own number for it
TAKING_STEPS, STOP_ASKED, GONE = b"s", b"a", b"g"


@dataclass(frozen=True)
class Process:
    """One process of this machine, told from a later one with the same number by when it was started.

    Attributes:
        pid: its number.
        started: clock ticks after the machine's start.
    """

    pid: int
    started: int


@dataclass(frozen=True)
class Watched:
    """What must stay for a process to go on.

    Attributes:
        processes: by what they are called.
        listeners: inodes of listening TCP sockets, by what they are called.
    """

    processes: dict[str, Process]
    listeners: dict[str, int]

    def gone(self) -> str:
        """What of it is there no more; "" when all of it is."""
        for name, process in self.processes.items():
            if not runs(process):
                return f"{name} (process {process.pid})"
        with contextlib.suppress(OSError):  # what cannot be seen is not known to be gone
            for name, inode in self.listeners.items():
                # The kernel gives its table in pieces, and one that closes meanwhile may hide another: look again.
                if inode not in listening().values() and inode not in listening().values():
                    return name
        return ""


def process(pid: int) -> Process | None:
    """The process that has this number now; None: there is none, or it has ended and only its parent has to hear it."""
    fields = stat(pid)
    return None if not fields or fields[0] in "ZX" else Process(pid, int(fields[19]))


def runs(known: Process) -> bool:
    """Whether it has not ended. One that is stopped, that is traced, or that may not be looked at, has not."""
    return process(known.pid) == known or is_hidden(known.pid)


def is_hidden(pid: int) -> bool:
    """Whether there is a process that may not be looked at: /proc may show a user's own alone (`hidepid`)."""
    if pid < 1 or stat(pid):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (state, parent, group, ...); [] where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def parent(pid: int) -> int:
    """Number of the process that a process is a child of; 0: none that is seen here."""
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def ancestors() -> Iterator[int]:
    """Numbers of the parent, of its parent and so on, as far as they are seen here."""
    pid = os.getppid()
    while pid:
        yield pid
        pid = parent(pid)


def words(pid: int) -> list[str]:
    """The command line of a process; [] where it cannot be read."""
    return _strings(pid, "cmdline")


def variables(pid: int) -> list[str]:
    """The environment that a process was started with, as NAME=VALUE; [] where it cannot be read."""
    return _strings(pid, "environ")


def _strings(pid: int, name: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return [os.fsdecode(part) for part in file.read().rstrip(b"\0").split(b"\0") if part]
    except OSError:
        return []


def is_first_namespace() -> bool:
    """Whether processes are numbered here as the kernel does: the machine itself, or a container that shares it."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid") == f"pid:[{_FIRST_NAMESPACE}]"
    return False


@cache
def machine() -> str:
    """Where a process number means something: this host, since its last start, in this container. "": not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def listening() -> dict[int, int]:
    """Inode of the socket that listens on each TCP port of this machine (of this network namespace).

    Raises:
        OSError: they cannot be looked at.
    """
    found = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    found[int(fields[1].rpartition(":")[2], 16)] = int(fields[9])
    return found


def watcher_arguments(watched: Watched, channel: int) -> list[str]:
    """The arguments with which this file, as a program, watches for the process that calls.

    Args:
        watched: what must stay.
        channel: descriptor of a socket: this process says what it is about to do, the watcher that something is gone.
    """
    own = process(os.getpid())
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or ""
    return [json.dumps({"channel": channel, "own": asdict(own), "rank": rank, **asdict(watched)})]


class Watcher:
    """Ends a process when what it depends on is gone: at once as long as it takes no steps, else after a moment.

    Args:
        own: the process.
        rank: as messages call it; "": it is alone.
        watched: what must stay.
        channel: says TAKING_STEPS and STOP_ASKED; is told GONE.
    """

    def __init__(self, own: Process, rank: str, watched: Watched, channel: socket.socket) -> None:
        self._own, self._watched, self._channel = own, watched, channel
        self._name = f"[rank {rank}] " if rank else ""
        self._saves = self._stops = False
        self._looking = select.poll()
        self._open = {channel.fileno()}
        for each in (own, *watched.processes.values()):
            # Wakes at once when it ends; where the kernel has no such thing, the next look finds it.
            with contextlib.suppress(OSError, AttributeError):
                self._open.add(os.pidfd_open(each.pid))
        for descriptor in self._open:
            self._looking.register(descriptor, select.POLLIN)

    def run(self) -> None:
        """Until the process has ended, by itself or not."""
        gone, since, said = "", 0.0, False
        while runs(self._own):
            self._look()
            if not gone and (gone := self._watched.gone()):
                since = time.monotonic()
                if not self._saves:
                    return self._end(f"its launcher is gone: {gone}")
                with contextlib.suppress(OSError):
                    self._channel.send(GONE)
            seconds = time.monotonic() - since
            if gone and not said and not self._stops and seconds > SILENT_SECONDS:
                said = True
                self._say(f"its launcher is gone: {gone}; finishing the step, then saving, if that is quick")
            if gone and seconds > (STOPPING_SECONDS if self._stops else SAVE_SECONDS):
                return self._end(f"not ended {seconds:.0f} s after its launcher")

    def _look(self) -> None:
        for descriptor, _ in self._looking.poll(1000 * LOOK_SECONDS):
            heard = b""
            if descriptor == self._channel.fileno():
                with contextlib.suppress(OSError):
                    heard = self._channel.recv(64)
                self._saves |= TAKING_STEPS in heard
                self._stops |= STOP_ASKED in heard
            if not heard:  # ended, or closed: it would wake this process for ever
                self._looking.unregister(descriptor)

    def _end(self, why: str) -> None:
        if runs(self._own):
            os.kill(self._own.pid, signal.SIGKILL)
            self._say(f"{why}; ended")

    def _say(self, text: str) -> None:
        """Into the standard error that the process has too, unless nobody takes anything out of it."""
        writing = select.poll()
        writing.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):
            if any(event & select.POLLOUT for _, event in writing.poll(0)):
                os.write(2, f"pause-megatron: {self._name}{text}\n".encode())


def main(text: str) -> None:
    """Watch as `watcher_arguments` says."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, which decides what they mean
    given = json.loads(text)
    processes = {name: Process(**each) for name, each in given["processes"].items()}
    watched = Watched(processes, given["listeners"])
    Watcher(Process(**given["own"]), given["rank"], watched, socket.socket(fileno=given["channel"])).run()


if __name__ == "__main__":
    main(sys.argv[1])
