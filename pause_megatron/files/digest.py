"""Digests of bytes and files: one algorithm, one spelling ('xxh3_128:HEX'), bounded memory.

xxh3_128 detects damage at memory speed (tens of GB/s). It is not cryptographic: it does not detect forgery.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

PREFIX = "xxh3_128:"
_READ_BYTES = 1 << 20


class Hasher:
    """The digest of bytes that arrive in pieces.

    Args:
        data: The first piece.
    """

    def __init__(self, data: bytes = b"") -> None:
        self._hash = xxhash.xxh3_128(data)

    def update(self, data: bytes | memoryview) -> None:
        """Add the next piece."""
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """Digest of all pieces so far, as 'xxh3_128:HEX'."""
        return PREFIX + self._hash.hexdigest()


class BlockDigests:
    """Digests of consecutive blocks of a file, updated as it is written.

    Args:
        block_bytes: Size of a block in bytes.

    Attributes:
        block_bytes: Size of a block in bytes.
    """

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._finished: list[str] = []
        self._hasher = Hasher()
        self._filled = 0

    def update(self, data: bytes) -> None:
        """Add the next bytes of the file."""
        rest = memoryview(data)
        while rest:
            piece = rest[: self.block_bytes - self._filled]
            self._hasher.update(piece)
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == self.block_bytes:
                self._finished.append(self._hasher.digest)
                self._hasher, self._filled = Hasher(), 0

    @property
    def digests(self) -> list[str]:
        """Digests of the blocks so far, each as 'xxh3_128:HEX'; the last block may be shorter."""
        return [*self._finished, self._hasher.digest] if self._filled else [*self._finished]


def bytes_digest(data: bytes) -> str:
    """Return the digest of bytes, as 'xxh3_128:HEX'.

    Args:
        data: The bytes.
    """
    return Hasher(data).digest


def file_digest(
    path: Path, start: int = 0, end: int | None = None, on_read: Callable[[int], None] | None = None
) -> str:
    """Return the digest of a file or of a range of its bytes, as 'xxh3_128:HEX'. It is read in pieces of 1 MiB.

    Args:
        path: The file.
        start: First byte.
        end: End of the range, exclusive; None for the end of the file. A file that is shorter is read to its end.
        on_read: Called with the size of each piece in bytes.

    Raises:
        OSError: It cannot be read.
    """
    hasher = Hasher()
    buffer = memoryview(bytearray(_READ_BYTES if end is None else max(min(_READ_BYTES, end - start), 0)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size := file.readinto(buffer if end is None else buffer[: end - start]):
            hasher.update(buffer[:size])
            start += size
            if on_read is not None:
                on_read(size)
    return hasher.digest
