"""Files that appear complete or not at all: digested writing, publishing by rename, one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pause_megatron.errors import DataError

READ_BYTES = 1 << 20


class DigestFile:
    """A file being written under a temporary name, its digest taken on the way. `publish` makes it visible.

    xxh3_128 finds damage at memory speed (tens of GB/s); it is no defence against somebody who forges a corpus.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish or discard
        self._hash = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    @property
    def digest(self) -> str:
        """Digest of everything written so far, as 'xxh3_128:HEX'."""
        return f"xxh3_128:{self._hash.hexdigest()}"

    def finish(self) -> None:
        """Bring the bytes to the disk; the file keeps its temporary name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        """Finish, and give the file its name."""
        if not self._file.closed:
            self.finish()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Drop what was written, unless it was published."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class BlockDigests:
    """Digests of a file in blocks of `block_bytes`, taken piece by piece as the file is written."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._finished: list[str] = []
        self._hash = xxhash.xxh3_128()
        self._filled = 0

    def update(self, data: bytes) -> None:
        """Append bytes."""
        rest = memoryview(data)
        while rest:
            piece = rest[: self.block_bytes - self._filled]
            self._hash.update(piece)
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == self.block_bytes:
                self._finished.append(f"xxh3_128:{self._hash.hexdigest()}")
                self._hash, self._filled = xxhash.xxh3_128(), 0

    @property
    def digests(self) -> list[str]:
        """Digests of the blocks so far, the last one maybe shorter, each as 'xxh3_128:HEX'."""
        return [*self._finished, f"xxh3_128:{self._hash.hexdigest()}"] if self._filled else [*self._finished]


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it appears complete or not at all, and survives a power cut."""
    file = DigestFile(path)
    try:
        file.write(data)
        file.publish()
    finally:
        file.discard()
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Bring the bytes of a file that is written and closed to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# On Linux a folder is synced as a file is; that makes the names in it durable.
sync_folder = sync_file


def point(link: Path, target: str) -> None:
    """Make `link` lead to `target` (a name in its folder), replacing an older one in a single step.

    A symbolic link; where the file system has none, a file that holds the name.

    Raises:
        OSError: neither can be made, or a folder is in the way.
    """
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(target)
    except OSError:
        write_whole(link, f"{target}\n".encode())
        return
    try:
        os.replace(partial, link)
    except OSError:
        partial.unlink()
        raise
    sync_folder(link.parent)


def read_regular(path: Path, largest: int) -> bytes:
    """Bytes of a small file.

    Raises:
        OSError: it cannot be read, is larger than `largest` bytes, or is a folder, a pipe or a device, on which reading
            might wait for ever.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected a file, got something else of that name")
    if status.st_size > largest:
        raise OSError(errno.EFBIG, f"expected at most {largest:,} bytes, got {status.st_size:,}")
    return path.read_bytes()


def digest_of(path: Path) -> str:
    """Digest of a whole file, as `DigestFile.digest` gives it."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return f"xxh3_128:{hasher.hexdigest()}"


@contextlib.contextmanager
def only_writer(path: Path, what: str) -> Iterator[int]:
    """Hold an exclusive lock on `path` (created, and removed at the end) while the body runs.

    The lock goes with the process, so a killed one leaves no stale lock behind. A child that is given the descriptor
    which the body receives (`subprocess.Popen(pass_fds=...)`) holds the lock too, should its parent be killed.

    Raises:
        DataError: another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(f"another process is working on {what} (it holds {path}); wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                os.close(descriptor)
                raise
            print(f"warning: {path.parent} has no file locks; run one prepare at a time there", file=sys.stderr)
        # Between open and flock the former holder may have removed the file: then this lock is on a nameless file.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                break
        os.close(descriptor)
    try:
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
