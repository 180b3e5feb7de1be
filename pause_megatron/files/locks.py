"""Lock files with a heartbeat, for file systems without locks, or with locks that are local to a host.

The file is created atomically, so that one of two concurrent processes gets it. It names its process, by which this
host knows whether the owner still runs. The owner rewrites it periodically (the heartbeat), by which other hosts know.
The owner writes through its open descriptor. If it was suspended and another process took over, it writes to an
unlinked file when it resumes, and it checks the path before anything else.
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
from typing import Any, NamedTuple

from pause_megatron.errors import DataError
from pause_megatron.host import processes
from pause_megatron.host.processes import Process, Watched
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
BEATS_UNTIL_GONE = 4
# After creating the file in place of a dead owner's: another process may have found that owner dead at the same time.
_SETTLE_SECONDS = 0.3
_MOST_BYTES = 1 << 16
_RECORD_BYTES = 2048
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.EINVAL)

OwnerRecord = Mapping[str, Any]
"""Content of a lock file: host, process, start time, ..., and further entries of the caller."""


class _Snapshot(NamedTuple):
    """Identity and content of a file at one time."""

    inode: int
    modified_ns: int
    size: int
    data: bytes


class HeldError(DataError):
    """A lock file that another process holds.

    Args:
        message: The message.
        record: Content of the lock file.

    Attributes:
        record: Content of the lock file; {} where it cannot be read.
    """

    def __init__(self, message: str, record: OwnerRecord) -> None:
        super().__init__(message)
        self.record = record


class Holding:
    """A held lock file, until `close`, or until other processes find its owner dead.

    Args:
        path: The lock file.
        beat_seconds: Heartbeat interval. An owner on another host counts as dead after `BEATS_UNTIL_GONE` of them.
        about: Further entries of the record.

    Raises:
        HeldError: Another process holds it.
        OSError: The file cannot be created.
    """

    def __init__(self, path: Path, beat_seconds: float = BEAT_SECONDS, about: OwnerRecord | None = None) -> None:
        self._path, self._beat_seconds = path, beat_seconds
        self._record = {**_own_record(), **(about or {})}
        self._lock, self._done = threading.Lock(), threading.Event()
        if (last := _look(path)) is not None:
            _wait_for_its_end(path, last, beat_seconds)
            _remove(path, last)
        self._file = _create(path, _packed(self._record))
        if last is not None:
            time.sleep(_SETTLE_SECONDS)
        self._sure = _clocks()
        if other := self.taken_over():
            os.close(self._file)
            raise HeldError(f"{path}: just taken by {other}", read(path))
        self._thread = threading.Thread(target=self._beat, name="holding", daemon=True)
        self._thread.start()

    def taken_over(self) -> str:
        """Return which process holds the lock instead of this one; "" while this one does. Reads the file."""
        with self._lock:
            try:
                # O_NONBLOCK: the path may be a pipe by now.
                with open(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                    same = os.path.samestat(os.fstat(file.fileno()), os.fstat(self._file))
                    there = _unpacked(file.read(_MOST_BYTES))
            except FileNotFoundError:
                same, there = self._create_again(), {}
            except OSError:
                return ""  # not known; the next write raises its own error
            if there.get("token") == self._record["token"] or (same and not there):
                self._sure = _clocks()
                return ""
            return name_of(there)

    def taken_over_while_away(self) -> str:
        """Return what `taken_over` does; the file is read only if this process may have been suspended too long."""
        away = max(now - then for now, then in zip(_clocks(), self._sure, strict=True))
        return self.taken_over() if away > self._beat_seconds * (BEATS_UNTIL_GONE - 1) else ""

    def close(self) -> bool:
        """Release the lock, and return whether this process still held it."""
        self._done.set()
        self._thread.join()
        try:
            held = not self.taken_over()
            if held:
                with contextlib.suppress(OSError):
                    _remove(self._path, _look(self._path))
        finally:
            os.close(self._file)
        return held

    def _create_again(self) -> bool:
        """Create the deleted file again, and return whether this process holds it."""
        try:
            descriptor = _create(self._path, _packed(self._record))
        except HeldError:
            return False
        except OSError:  # the folder was deleted, too
            return True
        os.dup2(descriptor, self._file)
        os.close(descriptor)
        return True

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(self._beat_seconds):
            count += 1
            with contextlib.suppress(OSError):  # the next save reports a full disk
                # Into the file that this process created, even if another one has its name now.
                os.pwrite(self._file, _packed({**self._record, "beat": count}), 0)
                os.fsync(self._file)
                self.taken_over()


class Backoff:
    """Waiting times between attempts to take a lock; each wait is twice the one before, up to the longest.

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


def read(path: Path) -> OwnerRecord:
    """Return the record of a lock file; {} where there is none, or it cannot be parsed."""
    found = _look(path)
    return {} if found is None else _unpacked(found.data)


def name_of(record: OwnerRecord) -> str:
    """Return the owner of a lock file as text, for messages.

    Args:
        record: Content of the lock file.
    """
    if "process" not in record:
        return "an unknown process"
    job = f", SLURM job {record['job']}" if record.get("job") else ""
    return f"process {record['process']} on {record.get('host')}{job}, since {record.get('since')}"


def is_here(record: OwnerRecord) -> bool:
    """Return whether the owner's process is visible from here: on the same host and in the same container."""
    return bool(processes.machine()) and record.get("machine") == processes.machine()


def runs(record: OwnerRecord) -> bool:
    """Return whether the owner's process runs, for a record that `is_here`."""
    try:
        return processes.runs(Process(int(record["process"]), int(record["started"])))
    except (KeyError, OverflowError, TypeError, ValueError):  # 1e999 is valid JSON, but no integer
        return False


def is_orphan(record: OwnerRecord) -> bool:
    """Return whether the owner is a process of this host whose launcher has ended, so that it will end soon."""
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


def _packed(record: OwnerRecord) -> bytes:
    """Serialize to a fixed length, so that a later record overwrites an earlier one."""
    return json.dumps(record).encode().ljust(_RECORD_BYTES - 1) + b"\n"


def _unpacked(data: bytes) -> OwnerRecord:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # deeply nested brackets
        return {}
    return record if isinstance(record, dict) else {}


def _clocks() -> tuple[float, float]:
    """Return two clocks: on some hosts the first stops during suspension, and the second may be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def _look(path: Path) -> _Snapshot | None:
    """Return identity and content of a file; None where there is none.

    Raises:
        OSError: It is a folder, a pipe or the like.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EEXIST, f"{path}: expected a regular file or none, got something else; remove it")
    data = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # without read permission, its times still change
        data = file.read(_MOST_BYTES)
    return _Snapshot(status.st_ino, status.st_mtime_ns, status.st_size, data)


def _wait_for_its_end(path: Path, last: _Snapshot, beat_seconds: float) -> None:
    """Return once the owner is known to be dead."""
    record = _unpacked(last.data)
    if is_here(record):
        if runs(record):
            raise HeldError(f"{path}: held by {name_of(record)}", record)
        return
    seconds, silent = BEATS_UNTIL_GONE * beat_seconds, _age(path)
    if silent <= seconds:
        log.info(f"{path}: stale lock of {name_of(record)}; waiting {seconds:.0f} s for a heartbeat", extra=EVERY_RANK)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(beat_seconds / 4)
            if (now := _look(path)) != last:
                if now is None:  # released
                    return
                raise HeldError(f"{path}: held by {name_of(_unpacked(now.data))}", _unpacked(now.data))
        silent = max(silent, seconds)
    log.info(f"{path}: no heartbeat from {name_of(record)} for {silent:.0f} s: taking over the lock", extra=EVERY_RANK)


def _age(path: Path) -> float:
    """Return the seconds since a file was written, by the file system's clock, since hosts' clocks differ."""
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


def _create(path: Path, content: bytes) -> int:
    """Create the file atomically, and return its descriptor.

    Raises:
        HeldError: Another process was first.
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
    try:  # without hard links the file is empty at first, which counts as a live owner
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise HeldError(f"{path}: held by {name_of(read(path))}", read(path)) from None
    _write_all(descriptor, content)
    return descriptor


def _write_all(descriptor: int, content: bytes) -> None:
    if os.pwrite(descriptor, content, 0) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _remove(path: Path, last: _Snapshot | None) -> None:
    """Delete the file that was read, and not another one that has its name by now."""
    aside = _beside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        now = _look(aside)
        if last is None or now is None or _unpacked(now.data).get("token") != _unpacked(last.data).get("token"):
            with contextlib.suppress(OSError):  # another process has created one since, and checks its path, too
                os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
