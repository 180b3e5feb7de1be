"""A small file that says whose a place is, right also where there are no file locks, or locks that one machine sees.

It is made in one step that fails where there is one already, so of two that come at the same instant one has it. It
names a process, by which this machine knows whether its maker still runs, and it changes as long as that is so, by
which other machines know it. Its maker writes into the very file that it made: one that was frozen, given up by the
others and followed writes into a file without a name when it wakes, and looks before it does anything else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.host import processes
from pause_megatron.host.processes import Process, Watched
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
BEATS_UNTIL_GONE = 4
# Between making the file and being sure of it, where others may just have found the one before it to be dead.
_SETTLE_SECONDS = 0.3
_MOST_BYTES = 1 << 16
_RECORD_BYTES = 2048
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.EINVAL)

Record = Mapping[str, Any]


class HeldError(DataError):
    """A place that is somebody else's.

    Attributes:
        record: what the other has written, {} where it cannot be read.
    """

    def __init__(self, message: str, record: Record) -> None:
        super().__init__(message)
        self.record = record


class Holding:
    """Who makes the file has the place until `close`, or until others find it dead.

    Args:
        path: of the file.
        beat_seconds: between two changes of it; a maker on another machine is gone after `BEATS_UNTIL_GONE` of them.
        about: further entries of the record.

    Raises:
        HeldError: another process has it.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, beat_seconds: float = BEAT_SECONDS, about: Record | None = None) -> None:
        self._path, self._beat_seconds = path, beat_seconds
        self._record = {**_own_record(), **(about or {})}
        self._lock, self._done = threading.Lock(), threading.Event()
        if (last := _look(path)) is not None:
            _wait_for_its_end(path, last, beat_seconds)
            _remove(path, last)
        self._file = _make(path, _packed(self._record))
        if last is not None:
            time.sleep(_SETTLE_SECONDS)
        self._sure = _clocks()
        if other := self.taken_over():
            os.close(self._file)
            raise HeldError(f"{path}: just taken by {other}", read(path))
        self._thread = threading.Thread(target=self._beat, name="holding", daemon=True)
        self._thread.start()

    def taken_over(self) -> str:
        """Who has the place now, if it is another one; "" as long as it is this one. Looks at the file."""
        with self._lock:
            try:
                # Without waiting, should somebody have put a pipe there.
                with open(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                    same = os.path.samestat(os.fstat(file.fileno()), os.fstat(self._file))
                    there = _unpacked(file.read(_MOST_BYTES))
            except FileNotFoundError:
                same, there = self._make_again(), {}
            except OSError:
                return ""  # nobody can say: the next write has its own error
            if there.get("token") == self._record["token"] or (same and not there):
                self._sure = _clocks()
                return ""
            return name_of(there)

    def taken_over_while_away(self) -> str:
        """As `taken_over`; the file is looked at only when the last look is older than others would wait."""
        away = max(now - then for now, then in zip(_clocks(), self._sure, strict=True))
        return self.taken_over() if away > self._beat_seconds * (BEATS_UNTIL_GONE - 1) else ""

    def close(self) -> bool:
        """Give the place up; whether it was still this one's."""
        self._done.set()
        self._thread.join()
        try:
            mine = not self.taken_over()
            if mine:
                with contextlib.suppress(OSError):
                    _remove(self._path, _look(self._path))
        finally:
            os.close(self._file)
        return mine

    def _make_again(self) -> bool:
        """Somebody has deleted the file; whether it is there again. Not if another one was first."""
        try:
            made = _make(self._path, _packed(self._record))
        except HeldError:
            return False
        except OSError:  # the folder is gone too
            return True
        os.dup2(made, self._file)
        os.close(made)
        return True

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(self._beat_seconds):
            count += 1
            with contextlib.suppress(OSError):  # a full disk is the next save's to report
                # Into the file that was made, whatever has its name now.
                os.pwrite(self._file, _packed({**self._record, "beat": count}), 0)
                os.fsync(self._file)
                self.taken_over()


class Backoff:
    """Waits between attempts to take a lock; each wait is twice the one before, up to the longest.

    Args:
        shortest_seconds: The first wait.
        longest_seconds: The longest wait.
    """

    def __init__(self, shortest_seconds: float, longest_seconds: float) -> None:
        self._seconds, self._longest = shortest_seconds, longest_seconds

    def wait(self) -> None:
        """Sleep until the next attempt."""
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, self._longest)


def read(path: Path) -> Record:
    """What the file says; {} where there is none, or nothing that can be read."""
    found = _look(path)
    return {} if found is None else _unpacked(found[1])


def name_of(record: Record) -> str:
    """Whose a record is, for messages."""
    if "process" not in record:
        return "a process that left no name"
    job = f", SLURM job {record['job']}" if record.get("job") else ""
    return f"process {record['process']} on {record.get('host')}{job}, since {record.get('since')}"


def is_here(record: Record) -> bool:
    """Whether its process would be seen from here: not on another machine, nor in another container."""
    return bool(processes.machine()) and record.get("machine") == processes.machine()


def runs(record: Record) -> bool:
    """Whether the process of a record that `is_here` has not ended."""
    try:
        return processes.runs(Process(int(record["process"]), int(record["started"])))
    except (KeyError, OverflowError, TypeError, ValueError):  # 1e999 is a number of JSON's, and no integer
        return False


def is_orphan(record: Record) -> bool:
    """Whether it is a process of this machine whose launcher has ended, so that it is about to end as well."""
    try:
        given = record["launcher"]
        watched = Watched({name: Process(**each) for name, each in given["processes"].items()}, given["listeners"])
        return is_here(record) and runs(record) and bool(watched.gone())
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return False


def _own_record() -> dict[str, Any]:
    own = processes.process(os.getpid())
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": processes.machine(),
        "started": asdict(own)["started"] if own else None,
        "token": secrets.token_hex(8),
        "beat": 0,
    }


def _packed(record: Record) -> bytes:
    """Of one length, so that a later one covers an earlier one."""
    return json.dumps(record).encode().ljust(_RECORD_BYTES - 1) + b"\n"


def _unpacked(data: bytes) -> Record:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # brackets alone
        return {}
    return record if isinstance(record, dict) else {}


def _clocks() -> tuple[float, float]:
    """One stands still while a machine sleeps, on some machines; the other one may be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def _look(path: Path) -> tuple[tuple[int, int, int], bytes] | None:
    """What tells this file and its state from others, and its content; None where there is none.

    Raises:
        OSError: no file, but a folder, a pipe or the like.
    """
    try:
        there = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EEXIST, f"expected a file or nothing at {path}, got another kind of thing; remove it")
    data = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # one that may not be read changes all the same
        data = file.read(_MOST_BYTES)
    return (there.st_ino, there.st_mtime_ns, there.st_size), data


def _wait_for_its_end(path: Path, last: tuple, beat_seconds: float) -> None:
    """Return when the one that made the file is known to be gone."""
    record = _unpacked(last[1])
    if is_here(record):
        if runs(record):
            raise HeldError(f"{path}: held by {name_of(record)}", record)
        return
    seconds, silent = BEATS_UNTIL_GONE * beat_seconds, _age(path)
    if silent <= seconds:
        log.info(f"{path}: left by {name_of(record)}; waiting {seconds:.0f} s for a sign of life", extra=EVERY_RANK)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(beat_seconds / 4)
            if (now := _look(path)) != last:
                if now is None:  # given up
                    return
                raise HeldError(f"{path}: held by {name_of(_unpacked(now[1]))}", _unpacked(now[1]))
        silent = max(silent, seconds)
    log.info(f"{path}: {name_of(record)} gave no sign of life for {silent:.0f} s: taken over", extra=EVERY_RANK)


def _age(path: Path) -> float:
    """Seconds since a file was written, by the clock of the file system: clocks of machines differ."""
    probe = _beside(path)
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _make(path: Path, content: bytes) -> int:
    """Make the file in one step; a descriptor of it.

    Raises:
        HeldError: another process was first.
    """
    partial = _beside(path)
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, content)
        os.link(partial, path)
        return descriptor
    except FileExistsError:
        os.close(descriptor)
        raise HeldError(f"{path}: held by {name_of(read(path))}", read(path)) from None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LINKS:
            raise
    finally:
        partial.unlink(missing_ok=True)
    try:  # no hard links here: then it is empty for a moment, which is taken for a file that may be alive
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise HeldError(f"{path}: held by {name_of(read(path))}", read(path)) from None
    _write_all(descriptor, content)
    return descriptor


def _write_all(descriptor: int, content: bytes) -> None:
    if os.pwrite(descriptor, content, 0) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _remove(path: Path, last: tuple | None) -> None:
    """Take away the file that was looked at, and no other that has its name by now."""
    aside = _beside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        if last is None or _unpacked(_look(aside)[1]).get("token") != _unpacked(last[1]).get("token"):
            with contextlib.suppress(OSError):  # somebody has made one since: that one's maker looks, too
                os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
