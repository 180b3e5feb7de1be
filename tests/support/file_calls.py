"""Interception of the system calls with which a process changes files, before the kernel executes them.

After `hand_over` a process can be delayed or killed at a chosen call, or the call can fail with a chosen errno. So a
test places a full disk, a delay or a kill exactly, on any machine, in Rust and C++ code as well as in Python. This uses
seccomp's user notification (Linux 5.19 or newer), and needs no privileges.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

# Call: (number on x86_64, number on aarch64, what it acts on). "fd": argument 0; a number: the argument that is the
# path, behind a folder's descriptor where the call takes one ("at").
_CALLS: dict[str, tuple[int | None, int | None, str | int]] = {
    "open": (2, None, 0),
    "openat": (257, 56, 1),
    "creat": (85, None, 0),
    "write": (1, 64, "fd"),
    "pwrite64": (18, 68, "fd"),
    "writev": (20, 66, "fd"),
    "ftruncate": (77, 46, "fd"),
    "fallocate": (285, 47, "fd"),
    "fsync": (74, 82, "fd"),
    "fdatasync": (75, 83, "fd"),
    "rename": (82, None, 1),
    "renameat": (264, 38, 3),
    "renameat2": (316, 276, 3),
    "mkdir": (83, None, 0),
    "mkdirat": (258, 34, 1),
    "symlink": (88, None, 1),
    "symlinkat": (266, 36, 2),
    "unlink": (87, None, 0),
    "unlinkat": (263, 35, 1),
    "rmdir": (84, None, 0),
}
_MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}  # column, audit name, number of seccomp
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_QUESTION = struct.Struct("=QIIiIQ6Q")  # id, thread, flags, number of the call, machine, instruction, arguments
_ANSWER = struct.Struct("=QqiI")  # id, value, error, flags
_GO_ON = 1
_AT_CWD = -100

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class FileCall:
    """One call that is about to happen.

    Attributes:
        name: of the call, as the kernel's manual has it, without "at" and numbers: open, write, fsync, rename, ...
        path: what it acts on; of a rename the new name, of a symlink the link
        writes: False for opening to read
    """

    name: str
    path: Path
    writes: bool


Decide = Callable[[int, FileCall], int]
"""Called with (rank, call) in a thread per rank; the call waits meanwhile. Returns 0 to let it happen, or its errno."""


def available() -> bool:
    """Whether the kernel lets a process hand over its file calls: tried in one that ends at once."""
    if platform.machine() not in _MACHINES:
        return False
    process = os.fork()
    if process == 0:
        try:
            _listener()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1] == 0


def hand_over(pipe: Connection) -> None:
    """Lets the process at the other end of the pipe decide on this one's file calls, of threads started later too."""
    listener = _listener()
    reduction.send_handle(pipe, listener, os.getppid())
    os.close(listener)


def _listener() -> int:
    """Descriptor where the kernel asks about this process's calls from now on."""
    column, machine, seccomp = _MACHINES[platform.machine()]
    numbers = [call[column] for call in _CALLS.values() if call[column] is not None]
    # Of the kernel's record of a call: 4 the machine, 0 the number. A jump skips as many instructions as it says.
    program = [(0x20, 0, 0, 4), (0x15, 0, len(numbers) + 1, machine), (0x20, 0, 0, 0)]
    program += [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _ASK)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _libc.prctl(38, 1, 0, 0, 0)  # no new privileges: what the kernel asks for in exchange
    listener = _libc.syscall(seccomp, 1, _NEW_LISTENER | _WAIT_KILLABLE, header)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp: no listener")
    return listener


def watch(pipe: Connection, rank: int, folder: Path, decide: Decide) -> threading.Thread:
    """Answers for the process that hands over through `pipe`, in a thread, until the process ends.

    Args:
        pipe: the other end is the process's; a socket pair
        rank: handed to `decide`
        folder: `decide` is asked about calls on what lies in it (or is it); all others go on
        decide: see `Decide`
    """
    thread = threading.Thread(target=_serve, args=(pipe, rank, folder, decide), daemon=True)
    thread.start()
    return thread


def _serve(pipe: Connection, rank: int, folder: Path, decide: Decide) -> None:
    try:
        listener = reduction.recv_handle(pipe)
    except (EOFError, OSError, RuntimeError):  # killed before it handed over
        return
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while not poll.poll()[0][1] & select.POLLHUP:
        question = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, question)
            number, thread, _, call, _, _, *arguments = _QUESTION.unpack(question)
            asked = _understand(thread, call, arguments)
            inside = asked is not None and asked.path.is_relative_to(folder)
            error = decide(rank, asked) if inside else 0
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(number, 0, -error, 0 if error else _GO_ON))
        except OSError:  # the process was killed while it waited
            continue
    os.close(listener)


def _understand(thread: int, number: int, arguments: list[int]) -> FileCall | None:
    """What is asked; None for sockets, pipes and what else has no path."""
    column = _MACHINES[platform.machine()][0]
    name, place = next((name, call[2]) for name, call in _CALLS.items() if call[column] == number)
    plain = name.removesuffix("2").removesuffix("64").removesuffix("at")
    if place == "fd":
        path = os.readlink(f"/proc/{thread}/fd/{arguments[0]}")
    else:
        path = _text(thread, arguments[place])
        if not path.startswith("/"):
            base = ctypes.c_int(arguments[place - 1]).value if "at" in name[-3:] else _AT_CWD
            path = os.path.join(os.readlink(f"/proc/{thread}/" + ("cwd" if base == _AT_CWD else f"fd/{base}")), path)
    if not path.startswith("/"):
        return None
    flags = {"open": arguments[1], "openat": arguments[2]}.get(name, os.O_WRONLY)
    return FileCall(plain, Path(os.path.normpath(path)), bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def _text(thread: int, address: int) -> str:
    """The string at an address of another process."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        text, found = b"", -1
        while found < 0:
            memory.seek(address + len(text))
            # Not beyond the page: the next one may not be there.
            text += memory.read(4096 - (address + len(text)) % 4096)
            found = text.find(b"\0")
    return os.fsdecode(text[:found])


Pick = Callable[[int, FileCall], bool]
"""Which calls count; called with (rank, call)."""


def writing(rank: int, call: FileCall) -> bool:
    """All that change something."""
    return call.writes


class Counting:
    """A `Decide` that counts calls and lets all happen.

    Attributes:
        count: of the picked ones, of all ranks
    """

    def __init__(self, pick: Pick = writing) -> None:
        self.count = 0
        self._pick, self._lock = pick, threading.Lock()

    def __call__(self, rank: int, call: FileCall) -> int:
        with self._lock:
            self.count += self._pick(rank, call)
        return 0


class Delay:
    """A `Decide` that blocks the rank that makes a chosen call, once.

    Args:
        pick: calls that count
        after: how many of them happen before the one that is held

    Attributes:
        reached: Set when the call was reached; it is executed after `release`.
    """

    def __init__(self, pick: Pick, after: int) -> None:
        self.reached = threading.Event()
        self._pick, self._left, self._lock, self._released = pick, after, threading.Lock(), threading.Event()

    def __call__(self, rank: int, call: FileCall) -> int:
        if self._comes(rank, call):
            self._released.wait()
        return 0

    def release(self) -> None:
        """Execute the blocked calls of ranks that are still alive."""
        self._released.set()

    def _comes(self, rank: int, call: FileCall) -> bool:
        with self._lock:
            if self.reached.is_set() or not self._pick(rank, call):
                return False
            self._left -= 1
            if self._left < 0:
                self.reached.set()
            return self._left < 0


class Ambush(Delay):
    """Block, from the chosen call on, every rank at its next call, so that all can be killed there."""

    def __call__(self, rank: int, call: FileCall) -> int:
        if self._comes(rank, call) or self.reached.is_set():
            self._released.wait()
        return 0
