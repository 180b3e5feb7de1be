"""The full check of a corpus at its first use, by one process while the others wait.

A record in the cache folder says that files of this path, size, time and digest were read whole and found right, so
that the check happens once, at a start or by `pause-megatron verify`. A file that is written again has another time, so
it is read again; what a disk does to a file in silence later is found with `data.verify=always` or the verb.
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

from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.verify import Damage, Report, damage_of, described, no_report, refuse
from pause_megatron.errors import DataError
from pause_megatron.files.durable import own_temporary_folder, write_whole
from pause_megatron.files.locks import Backoff

# Between two looks of a process that waits. Thousands may wait, on a file system that serves others too.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 5.0
_TELL_SECONDS = 1.0
_NOTE_BYTES = 256

# Told when a folder cannot be written.
Warn = Callable[[str], None]


def verify_at_use(
    corpus: Corpus,
    mode: Literal["once", "always", "never"],
    cache: str | Path | None = None,
    *,
    report: Report = no_report,
    warn: Warn = lambda message: None,
) -> bool:
    """Make sure that a corpus was read whole and found right. Every process calls this; one at a time reads.

    Waiting is done by looking for a record, not in a collective operation, which would run into its time limit. Where
    there is a record already, no lock is asked for.

    Args:
        corpus: opened.
        mode: data.verify. "always": this process does not trust an old record, but one that appears while it waits.
        cache: folder of the records; default: 'cache' beside the corpus.
        report: of the reading, see `damage_of`; while this process waits, of the one that reads.
        warn: told when the folder cannot be written, so that the check will be made again.

    Returns:
        whether this process read the corpus.

    Raises:
        DataError: damaged; also in the processes that waited.
    """
    if mode == "never":
        return False
    record, failed = _record_paths(corpus, cache)
    before = _stamp(record), _stamp(failed)
    if mode == "once" and before[0] is not None:
        return False

    def settled() -> bool:
        """Whether another process has found the corpus right meanwhile."""
        if _stamp(failed) not in (before[1], None):
            raise DataError(failed.read_text(encoding="utf-8").rstrip())
        return _stamp(record) not in (before[0], None)

    with contextlib.ExitStack() as closing:
        lock = None
        with contextlib.suppress(OSError):  # leaving the record says it
            record.parent.mkdir(parents=True, exist_ok=True)
            lock = closing.enter_context(_turn(record.with_suffix(".lock"), settled, report))
        if settled():
            return False
        refuse(corpus, check_and_record(corpus, cache, report=_telling(lock, report), warn=warn))
    return True


def check_and_record(
    corpus: Corpus,
    cache: str | Path | None = None,
    *,
    report: Report = no_report,
    warn: Warn = lambda message: None,
) -> list[Damage]:
    """Read a corpus whole and leave the record that `verify_at_use` looks for; where it is damaged, take it away.

    Args:
        corpus: opened.
        cache: folder of the records; default: 'cache' beside the corpus.
        report, warn: as in `verify_at_use`.

    Returns:
        every damaged block, see `damage_of`.
    """
    record, failed = _record_paths(corpus, cache)
    content = json.dumps(_described(corpus), indent=1)  # before the reading: what is written meanwhile is not covered
    if damage := damage_of(corpus, report):
        with contextlib.suppress(OSError):
            record.unlink(missing_ok=True)
        _leave(failed, described(corpus, damage), warn)
    else:
        _leave(record, content, warn)
    return damage


def record_as_read(corpus: Corpus, cache: str | Path | None = None, *, warn: Warn = lambda message: None) -> None:
    """Leave the record that `verify_at_use` looks for, for somebody who has just read every byte of a corpus.

    Args:
        corpus: opened.
        cache: folder of the records; default: 'cache' beside the corpus.
        warn: as in `verify_at_use`.
    """
    record, _ = _record_paths(corpus, cache)
    _leave(record, json.dumps(_described(corpus), indent=1), warn)


def _leave(path: Path, text: str, warn: Warn) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        warn(
            f"{path.parent}: cannot be written ({error.strerror}), so the corpus is verified again at the next start; "
            "name a folder with data.cache, or switch it off with data.verify=never"
        )


def _described(corpus: Corpus) -> dict:
    """The files as they are now. What differs here is verified anew."""
    files = {}
    for name, record in corpus.manifest.files.items():
        path = Path(os.path.realpath(path_of(corpus.prefix, name)))
        stat = path.stat()
        files[name] = {
            "path": str(path),
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "digest": record.digest,
        }
    return files


def _record_paths(corpus: Corpus, cache: str | Path | None) -> tuple[Path, Path]:
    folder = Path(cache) if cache else Path(os.path.abspath(corpus.prefix)).parent / "cache"
    # Named by what it says: machines with copies of their own may share one folder.
    key = xxhash.xxh3_128_hexdigest(json.dumps(_described(corpus), sort_keys=True).encode())
    stem = f"{Path(corpus.prefix).name}.{key[:16]}"
    return folder / f"{stem}.verified", folder / f"{stem}.damaged"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


@contextlib.contextmanager
def _turn(path: Path, settled: Callable[[], bool], report: Report) -> Iterator[int | None]:
    """Waits until this process may read: gives the lock, which goes with the process; or None once it is settled."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        backoff, mine = Backoff(_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS), False
        while not settled():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
                break
            except BlockingIOError:
                _pass_on(os.pread(descriptor, _NOTE_BYTES, 0), report)
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


def _telling(lock: int | None, report: Report) -> Report:
    """A report that is also left in the lock's file, now and then, for those who wait."""
    told = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal told
        report(stage, done, total)
        if lock is not None and time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            note = json.dumps([f"{stage} (process {os.getpid()} on {os.uname().nodename})", done, total])
            with contextlib.suppress(OSError):
                os.pwrite(lock, note.encode().ljust(_NOTE_BYTES), 0)

    return tell


def _pass_on(note: bytes, report: Report) -> None:
    with contextlib.suppress(ValueError):  # nothing there yet, or half of it
        stage, done, total = json.loads(note)
        report(stage, done, total)
