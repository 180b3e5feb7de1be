"""Atomic, durable file writes: digests taken while writing, publishing by rename, symbolic links, writer locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pause_megatron.errors import DataError
from pause_megatron.files.digest import Hasher
from pause_megatron.files.locks import HeldError, Holding

READ_BYTES = 1 << 20


class DigestFile:
    """A file that is written under a temporary name, its digest taken meanwhile. `publish` renames it.

    Args:
        path: Final path.

    Attributes:
        path: Final path.
        bytes: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish or discard
        self._hasher = Hasher()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._hasher.update(data)
        self.bytes += len(data)

    @property
    def digest(self) -> str:
        """Digest of everything written so far, as 'xxh3_128:HEX'."""
        return self._hasher.digest

    def finish(self) -> None:
        """Sync the file to disk and close it; it keeps its temporary name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        """Finish, and rename the file to its final path."""
        if not self._file.closed:
            self.finish()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Delete the temporary file, unless it was published."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file atomically, and sync it and its folder to disk.

    Args:
        path: Path of the file.
        data: Its content.
    """
    file = DigestFile(path)
    try:
        file.write(data)
        file.publish()
    finally:
        file.discard()
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Sync a closed file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# On Linux a folder is synced like a file, which makes the names in it durable.
sync_folder = sync_file


def symlink_atomic(link: Path, target: str) -> None:
    """Create or replace a symbolic link atomically. Where the file system has none, a file holds the target's name.

    Args:
        link: Path of the link.
        target: A name in the link's folder.

    Raises:
        OSError: Neither can be made, or a folder is in the way.
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
    """Return the content of a small regular file.

    Args:
        path: The file.
        largest: Largest size in bytes that is read.

    Raises:
        OSError: It cannot be read, is larger, or is a folder, a pipe or a device, on which reading might block.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected a file, got something else of that name")
    if status.st_size > largest:
        raise OSError(errno.EFBIG, f"expected at most {largest:,} bytes, got {status.st_size:,}")
    return path.read_bytes()


def own_temporary_folder() -> Path:
    """Return a private folder of this user (mode 0700) in the shared temporary folder, created if missing.

    Raises:
        OSError: The path exists and belongs to another user, or others may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"pause-megatron-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        expected = "expected a private folder of this user (mode 0700); remove it, or set TMPDIR"
        raise OSError(errno.EPERM, expected, str(folder))
    return folder


def file_lock(path: Path) -> int | None:
    """Take an exclusive lock on a file, created if missing. The kernel drops the lock when the process ends.

    Args:
        path: The lock file.

    Returns:
        The descriptor that holds the lock; None where the file system has no locks.

    Raises:
        BlockingIOError: Another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise
            return None  # file systems differ here: ENOLCK, ENOTSUP, ENOSYS, EINVAL, EACCES, EIO
        # The former holder may have removed the file between open and flock; then the lock is on an unlinked file.
        if has_name(descriptor, path):
            return descriptor
        os.close(descriptor)


def has_name(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at this path now.

    Args:
        descriptor: Of the open file.
        path: The path.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


@contextlib.contextmanager
def only_file_writer(path: Path, lock: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file while the body runs, and remove the temporary files of a killed process.

    Args:
        path: The file.
        lock: The lock file.
        what: What the file is, for the message.

    Raises:
        DataError: Another process writes it.
    """
    with only_writer(lock, what):
        for left in path.parent.iterdir():
            if left.name.startswith(f"{path.name}.") and left.suffix == ".tmp":
                left.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def only_writer(path: Path, what: str) -> Iterator[int]:
    """Hold a lock while the body runs, on `path`, or by a holder file where the file system has no locks.

    A child process that inherits the descriptor (`subprocess.Popen(pass_fds=...)`) keeps the lock if its parent is
    killed.

    Args:
        path: The lock file.
        what: What is being written, for the message.

    Yields:
        The descriptor of the lock file.

    Raises:
        DataError: Another process holds the lock.
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
