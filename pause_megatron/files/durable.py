"""Files that appear complete or not at all: digested writing, publishing by rename, one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pause_megatron.errors import DataError
from pause_megatron.files.locks import HeldError, Holding

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


def own_temporary_folder() -> Path:
    """A folder of this user alone, for files whose names others can guess, in the one that all users share.

    Raises:
        OSError: what has its name is somebody else's, or others may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"pause-megatron-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o077:
        expected = "expected a folder of this user alone (mode 0700); remove it, or set TMPDIR"
        raise OSError(errno.EPERM, expected, str(folder))
    return folder


def file_lock(path: Path) -> int | None:
    """Take an exclusive lock on `path` (created). It goes with the process: a killed one leaves no stale lock behind.

    Returns:
        The descriptor that holds it; None where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise
            return None  # file systems say this in many ways: ENOLCK, ENOTSUP, ENOSYS, EINVAL, EACCES, EIO
        # Between open and flock the former holder may have removed the file: then this lock is on a nameless file.
        if has_name(descriptor, path):
            return descriptor
        os.close(descriptor)


def has_name(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


@contextlib.contextmanager
def only_writer(path: Path, what: str) -> Iterator[int]:
    """Nobody else who asks for `path` goes on while the body runs: by a lock on it, or by a file where there are none.

    A child that is given the descriptor which the body receives (`subprocess.Popen(pass_fds=...)`) holds the lock too,
    should its parent be killed.

    Raises:
        DataError: another process holds it.
    """
    with contextlib.ExitStack() as closing:
        try:
            descriptor = file_lock(path)
            if descriptor is None:
                holding = Holding(path.with_name(f"{path.name}.holder"))
                closing.callback(holding.close)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (BlockingIOError, HeldError) as error:
            place = error if isinstance(error, HeldError) else f"it holds {path}"
            raise DataError(f"another process is working on {what} ({place}); wait for it or stop it") from None
        try:
            yield descriptor
        finally:
            if has_name(descriptor, path):
                path.unlink(missing_ok=True)
            os.close(descriptor)
