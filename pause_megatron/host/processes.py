"""Processes of this host through /proc: identity, liveness, ancestors; and the watcher of a rank's launcher.

The file is also a program that `host/launcher.py` starts with only the standard library, so it imports nothing of the
package. The watcher is a process of its own because a rank's threads do not run while an import, a compiler or a
library holds the interpreter's lock, and because a rank may be suspended.
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
SILENT_SECONDS = 0.75  # Ctrl-C also ends the launcher; the rank's own handler then writes the message
STOPPING_SECONDS = 60.0
_FIRST_NAMESPACE = 0xEFFFFFFC  # the kernel's inode number of the first PID namespace
TAKING_STEPS, STOP_ASKED, GONE = b"s", b"a", b"g"


@dataclass(frozen=True)
class Process:
    """A process of this host, distinct from a later one with the same number by its start time.

    Attributes:
        pid: Process number.
        started: Start time in clock ticks after the boot of the host.
    """

    pid: int
    started: int


@dataclass(frozen=True)
class Watched:
    """Processes and sockets of a launcher.

    Attributes:
        processes: Processes, by name.
        listeners: Inodes of listening TCP sockets, by name.
    """

    processes: dict[str, Process]
    listeners: dict[str, int]

    def gone(self) -> str:
        """Return the name of a process or socket that is gone; "" while all are there."""
        for name, process in self.processes.items():
            if not runs(process):
                return f"{name} (process {process.pid})"
        with contextlib.suppress(OSError):  # where the table cannot be read, nothing counts as gone
            for name, inode in self.listeners.items():
                # The table is read in pieces, and a socket that closes meanwhile may hide another: read it twice.
                if inode not in listening().values() and inode not in listening().values():
                    return name
        return ""


def process(pid: int) -> Process | None:
    """Return the process that has this number now; None where there is none, or it is a zombie."""
    fields = stat(pid)
    return None if not fields or fields[0] in "ZX" else Process(pid, int(fields[19]))


def runs(known: Process) -> bool:
    """Return whether a process has not ended. Stopped, traced and hidden processes have not."""
    return process(known.pid) == known or is_hidden(known.pid)


def is_hidden(pid: int) -> bool:
    """Return whether a process exists but is hidden: /proc may show a user's own processes only (`hidepid`)."""
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
    """Return the fields of /proc/PID/stat from the state on (state, parent, group, ...); [] without such a process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def parent(pid: int) -> int:
    """Return the parent's process number; 0 where it is not visible."""
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def ancestors() -> Iterator[int]:
    """Yield the process numbers of the parent, its parent and so on, as far as they are visible."""
    pid = os.getppid()
    while pid:
        yield pid
        pid = parent(pid)


def words(pid: int) -> list[str]:
    """Return the command line of a process; [] where it cannot be read."""
    return _strings(pid, "cmdline")


def variables(pid: int) -> list[str]:
    """Return a process's initial environment as NAME=VALUE; [] where it cannot be read."""
    return _strings(pid, "environ")


def _strings(pid: int, name: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return [os.fsdecode(part) for part in file.read().rstrip(b"\0").split(b"\0") if part]
    except OSError:
        return []


def is_first_namespace() -> bool:
    """Return whether this is the host's own PID namespace, or a container that shares it."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid") == f"pid:[{_FIRST_NAMESPACE}]"
    return False


@cache
def machine() -> str:
    """Return an id of the scope of process numbers: host, boot and PID namespace; "": not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def listening() -> dict[int, int]:
    """Return port -> inode of the listening TCP sockets of this network namespace.

    Raises:
        OSError: The kernel's table cannot be read.
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
    """Return the command-line arguments of the watcher of this process.

    Args:
        watched: The launcher.
        channel: Descriptor of a socket to this process, for TAKING_STEPS, STOP_ASKED and GONE.

    Raises:
        OSError: /proc does not show this process.
    """
    own = process(os.getpid())
    if own is None:
        raise OSError("/proc: expected this process, got none")
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or ""
    return [json.dumps({"channel": channel, "own": asdict(own), "rank": rank, **asdict(watched)})]


class Watcher:
    """The watcher of a rank: it kills the rank when its launcher ends, with time for a save once it trains.

    Args:
        own: The rank's process.
        rank: Rank for messages; "": a single process.
        watched: The launcher.
        channel: Receives TAKING_STEPS and STOP_ASKED; GONE is sent on it.
    """

    def __init__(self, own: Process, rank: str, watched: Watched, channel: socket.socket) -> None:
        self._own, self._watched, self._channel = own, watched, channel
        self._name = f"[rank {rank}] " if rank else ""
        self._saves = self._stops = False
        self._poll = select.poll()
        self._open = {channel.fileno()}
        for each in (own, *watched.processes.values()):
            # Wakes the poll when the process ends; without pidfd the next round notices it.
            with contextlib.suppress(OSError, AttributeError):
                self._open.add(os.pidfd_open(each.pid))
        for descriptor in self._open:
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> None:
        """Watch until the rank's process has ended."""
        gone, since, reported = "", 0.0, False
        while runs(self._own):
            self._receive()
            if not gone and (gone := self._watched.gone()):
                since = time.monotonic()
                if not self._saves:
                    return self._end(f"the launcher has exited: {gone}")
                with contextlib.suppress(OSError):
                    self._channel.send(GONE)
            seconds = time.monotonic() - since
            if gone and not reported and not self._stops and seconds > SILENT_SECONDS:
                reported = True
                self._report(f"the launcher has exited: {gone}; finishing the step, then saving, if that is quick")
            if gone and seconds > (STOPPING_SECONDS if self._stops else SAVE_SECONDS):
                return self._end(f"still running {seconds:.0f} s after its launcher exited")

    def _receive(self) -> None:
        for descriptor, _ in self._poll.poll(1000 * LOOK_SECONDS):
            received = b""
            if descriptor == self._channel.fileno():
                with contextlib.suppress(OSError):
                    received = self._channel.recv(64)
                self._saves |= TAKING_STEPS in received
                self._stops |= STOP_ASKED in received
            if not received:  # ended or closed: the poll would return at once from now on
                self._poll.unregister(descriptor)

    def _end(self, why: str) -> None:
        if runs(self._own):
            os.kill(self._own.pid, signal.SIGKILL)
            self._report(f"{why}; killed")

    def _report(self, text: str) -> None:
        """Write to the rank's standard error, unless that would block."""
        writing = select.poll()
        writing.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):
            if any(event & select.POLLOUT for _, event in writing.poll(0)):
                os.write(2, f"pause-megatron: {self._name}{text}\n".encode())


def main(text: str) -> None:
    """Run the watcher.

    Args:
        text: See `watcher_arguments`.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # handled by the rank
    given = json.loads(text)
    processes = {name: Process(**each) for name, each in given["processes"].items()}
    watched = Watched(processes, given["listeners"])
    Watcher(Process(**given["own"]), given["rank"], watched, socket.socket(fileno=given["channel"])).run()


if __name__ == "__main__":
    main(sys.argv[1])
