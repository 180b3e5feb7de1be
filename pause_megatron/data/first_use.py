"""The full check of a corpus at its first use, by one process while the others of its machine wait.

A record in the cache folder says that files of this path, size, time and digest were read whole and found right, so
that the check happens once. A file that is written again has another time, so it is read again; what a disk does to a
file in silence later is found with `data.verify=always` or `pause-megatron verify`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import xxhash

from pause_megatron.data.corpus import Corpus
from pause_megatron.data.manifest import path_of
from pause_megatron.data.verify import Report, no_report, verify_corpus
from pause_megatron.durable import write_whole
from pause_megatron.errors import DataError

POLL_SECONDS = 0.2


def verify_at_use(
    corpus: Corpus,
    mode: Literal["once", "always", "never"],
    cache: str | Path | None = None,
    *,
    report: Report = no_report,
    warn: Callable[[str], None] = lambda message: None,
) -> bool:
    """Make sure that a corpus was read whole and found right. Every process calls this; one at a time reads.

    Waiting is done by looking at a lock, not in a collective operation, which would run into its time limit.

    Args:
        corpus: opened.
        mode: data.verify. "always": this process does not trust an old record, but one that appears while it waits.
        cache: folder of the records; default: 'cache' beside the corpus.
        report: of the reading, see `verify_corpus`.
        warn: told when the folder cannot be written, so that the check will be made again.

    Returns:
        whether this process read the corpus.

    Raises:
        DataError: damaged; also in the processes that waited.
    """
    if mode == "never":
        return False
    folder = Path(cache) if cache else Path(os.path.abspath(corpus.prefix)).parent / "cache"
    record, failed = _record_paths(corpus, folder)
    before = _stamp(record), _stamp(failed)
    if mode == "once" and before[0] is not None:
        return False
    with contextlib.ExitStack() as closing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            closing.enter_context(_lock(record.with_suffix(".lock")))
        except OSError:
            pass  # `_leave` says it
        # Whoever held the lock while this process waited has left one of the two behind.
        if _stamp(record) != before[0]:
            return False
        if _stamp(failed) != before[1]:
            raise DataError(failed.read_text(encoding="utf-8").rstrip())
        try:
            verify_corpus(corpus, report)
        except DataError as error:
            _leave(failed, str(error), warn)
            raise
        _leave(record, json.dumps(_described(corpus), indent=1), warn)
    return True


def _leave(path: Path, text: str, warn: Callable[[str], None]) -> None:
    try:
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
        path = path_of(os.path.abspath(corpus.prefix), name)
        stat = path.stat()
        files[name] = {
            "path": str(path),
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "digest": record.digest,
        }
    return files


def _record_paths(corpus: Corpus, folder: Path) -> tuple[Path, Path]:
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
def _lock(path: Path) -> Iterator[None]:
    """An exclusive lock, waited for. It goes with the process: when a holder is killed the next one takes over."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                break  # no locks on this file system: every process reads for itself
        yield
    finally:
        os.close(descriptor)
