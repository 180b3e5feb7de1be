"""A file that a run appends whole records to, on a disk that may be full for a while."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class AppendedFile:
    """A file that grows by whole records: one that cannot be written raises OSError and leaves the file as it was.

    Args:
        path: The file. It is created with its folder where it does not exist, also when it was deleted or renamed
            since the last record.
        head: First bytes of a new file.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.path, self._head = path, head
        self._descriptor: int | None = None
        self._whole: int | None = None  # bytes of whole records, where part of one could not be truncated away

    def open(self) -> None:
        """Open the file, unless it is open and still at its path."""
        self._opened()

    def append(self, record: bytes) -> None:
        """Append one record.

        Args:
            record: The bytes of the record.

        Raises:
            OSError: The record cannot be written whole. The next call tries again.
        """
        descriptor = self._opened()
        if self._whole is not None:
            os.ftruncate(descriptor, self._whole)
            self._whole = None
        size = os.fstat(descriptor).st_size
        left = memoryview(record if size else self._head + record)
        total = len(left)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            if len(left) < total:
                self._whole = size
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                    self._whole = None
            raise

    def close(self) -> None:
        """Close the file, if it is open."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _opened(self) -> int:
        """Return the descriptor of the open file."""
        if self._descriptor is not None and self._is_at_path(self._descriptor):
            return self._descriptor
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Non-blocking: a pipe without a reader at this path must be an error, not a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        self._descriptor = os.open(self.path, flags, 0o666)
        self._whole = None
        return self._descriptor

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            at_path = os.stat(self.path)
        except FileNotFoundError:
            return False
        opened = os.fstat(descriptor)
        return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)
