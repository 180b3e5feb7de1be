"""Full verification of a corpus or a side array at its first use: one process reads it while the others wait.

A record in the cache folder states that the files of this path, size, modification time and digest were verified. So
the check happens once, at the first start or by `pause-megatron verify`. A file that is written again has another
modification time and is verified again. Later silent corruption on disk is found with `data.verify=always` or the verb.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import xxhash

from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.verify import Damage, Digested, damage_of, describe_damage, raise_if_damaged
from pause_megatron.errors import DataError
from pause_megatron.files.durable import own_temporary_folder, write_whole
from pause_megatron.files.locks import Backoff
from pause_megatron.terminal.progress import Report, no_report

# Between two looks of a process that waits. Thousands may wait, on a file system that serves others too.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 5.0
_NOTE_SECONDS = 1.0
_NOTE_BYTES = 256

Warn = Callable[[str], None]
"""Callback for warnings."""


def verify_at_use(
    digested: Digested,
    mode: Literal["once", "always", "never"],
    cache: str | Path | None = None,
    *,
    report: Report = no_report,
    warn: Warn = lambda message: None,
) -> bool:
    """Verify files unless a record states that they were verified. Every process calls this; one of them reads.

    The others poll for the record instead of waiting in a collective operation, whose timeout could expire. Where a
    record exists, no lock is taken.

    Args:
        digested: An opened corpus, or a side array.
        mode: Value of data.verify. With "always", only a record that is written during this call counts.
        cache: Folder of the records; None for `cache` beside them.
        report: Progress callback, see `damage_of`; a waiting process reports the progress of the reading one.
        warn: Called when the record cannot be written, so that the check will be repeated.

    Returns:
        True if this process read them.

    Raises:
        DataError: They are damaged; raised in the waiting processes too.
    """
    if mode == "never":
        return False
    record, failed = _record_paths(digested, cache)
    before = _stamp(record), _stamp(failed)
    if mode == "once" and before[0] is not None:
        return False

    def settled() -> bool:
        """Return whether another process has verified them since this call began."""
        if _stamp(failed) not in (before[1], None):
            raise DataError(failed.read_text(encoding="utf-8").rstrip())
        return _stamp(record) not in (before[0], None)

    with contextlib.ExitStack() as closing:
        lock = None
        with contextlib.suppress(OSError):  # leaving the record says it
            record.parent.mkdir(parents=True, exist_ok=True)
            lock = closing.enter_context(_reading_lock(record.with_suffix(".lock"), settled, report))
        if settled():
            return False
        raise_if_damaged(digested, check_and_record(digested, cache, report=_shared_report(lock, report), warn=warn))
    return True


def check_and_record(
    digested: Digested,
    cache: str | Path | None = None,
    *,
    report: Report = no_report,
    warn: Warn = lambda message: None,
) -> list[Damage]:
    """Verify files and write the record that `verify_at_use` checks for, or remove it if they are damaged.

    Args:
        digested: An opened corpus, or a side array.
        cache: Folder of the records; None for `cache` beside them.
        report: Progress callback, see `damage_of`.
        warn: Called when the record cannot be written.

    Returns:
        The damaged blocks, see `damage_of`.
    """
    record, failed = _record_paths(digested, cache)
    content = json.dumps(_file_states(digested), indent=1)  # before reading: later changes are not covered
    if damage := damage_of(digested, report):
        with contextlib.suppress(OSError):
            record.unlink(missing_ok=True)
        _write_record(failed, describe_damage(digested, damage), warn)
    else:
        _write_record(record, content, warn)
    return damage


def record_as_read(digested: Digested, cache: str | Path | None = None, *, warn: Warn = lambda message: None) -> None:
    """Write the record that `verify_at_use` checks for, after a caller has read every byte itself.

    Args:
        digested: An opened corpus, or a side array.
        cache: Folder of the records; None for `cache` beside them.
        warn: Called when the record cannot be written.
    """
    record, _ = _record_paths(digested, cache)
    _write_record(record, json.dumps(_file_states(digested), indent=1), warn)


def _write_record(path: Path, text: str, warn: Warn) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        warn(
            f"{path.parent}: cannot be written ({error.strerror}), so its files are verified again at the next start; "
            "set data.cache to a writable folder, or data.verify=never to skip the check"
        )


def _file_states(digested: Digested) -> dict[str, dict[str, str | int]]:
    """Return path, size, modification time and digest of each file; a change of any requires a new check."""
    files: dict[str, dict[str, str | int]] = {}
    for name, record in digested.files.items():
        path = Path(os.path.realpath(path_of(digested.prefix, name)))
        stat = path.stat()
        files[name] = {
            "path": str(path),
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "digest": record.digest,
        }
    return files


def _record_paths(digested: Digested, cache: str | Path | None) -> tuple[Path, Path]:
    folder = Path(cache) if cache else Path(os.path.abspath(digested.prefix)).parent / "cache"
    # The name contains a digest of the content: machines with their own copies may share one cache folder.
    key = xxhash.xxh3_128_hexdigest(json.dumps(_file_states(digested), sort_keys=True).encode())
    stem = f"{Path(digested.prefix).name}.{key[:16]}"
    return folder / f"{stem}.verified", folder / f"{stem}.damaged"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


@contextlib.contextmanager
def _reading_lock(path: Path, settled: Callable[[], bool], report: Report) -> Iterator[int | None]:
    """Yield the lock with which this process reads, or None once another process has settled the check."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        backoff, mine = Backoff(_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS), False
        while not settled():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
                break
            except BlockingIOError:
                _show_shared(os.pread(descriptor, _NOTE_BYTES, 0), report)
                backoff.wait()
            except OSError:
                # A file system without locks: one process of each machine reads.
                if path.parent == own_temporary_folder():
                    raise
                path = own_temporary_folder() / path.name
                local = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                os.close(descriptor)
                descriptor = local
        yield descriptor if mine else None
    finally:
        os.close(descriptor)


def _shared_report(lock: int | None, report: Report) -> Report:
    """Return a report that is also written to the lock's file from time to time, for the waiting processes."""
    written = 0.0

    def write(stage: str, done: int, total: int) -> None:
        nonlocal written
        report(stage, done, total)
        if lock is not None and time.monotonic() - written > _NOTE_SECONDS:
            written = time.monotonic()
            note = json.dumps([f"{stage} (process {os.getpid()} on {os.uname().nodename})", done, total])
            with contextlib.suppress(OSError):
                os.pwrite(lock, note.encode().ljust(_NOTE_BYTES), 0)

    return write


def _show_shared(note: bytes, report: Report) -> None:
    with contextlib.suppress(ValueError):  # nothing there yet, or half of it
        stage, done, total = json.loads(note)
        report(stage, done, total)
