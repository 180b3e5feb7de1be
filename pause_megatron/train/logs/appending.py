"""A file that grows during a run by whole records, on a disk that may be full for a while."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class AppendedFile:
    """Grows by whole records, or raises OSError and stays as it was. The next record is a new try.

    Args:
        path: made, with its folder, when it is not there; also when it was deleted or renamed since the last record
        head: what a new file begins with
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.path, self._head = path, head
        self._descriptor: int | None = None
        self._whole: int | None = None  # bytes of whole records, where a part of one could not be taken back

    def open(self) -> None:
        """Open the file, unless it is open and still there."""
        if self._descriptor is not None and self._is_there():
            return
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Non-blocking: a pipe in the file's place, without a reader, must be an error and not a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        self._descriptor = os.open(self.path, flags, 0o666)
        self._whole = None

    def append(self, record: bytes) -> None:
        """Append one record whole."""
        self.open()
        if self._whole is not None:
            os.ftruncate(self._descriptor, self._whole)
            self._whole = None
        size = os.fstat(self._descriptor).st_size
        left = memoryview(record if size else self._head + record)
        total = len(left)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            if len(left) < total:
                self._whole = size
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                    self._whole = None
            raise

    def close(self) -> None:
        """Close the file, if it is open."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _is_there(self) -> bool:
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._descriptor)
        return (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)
