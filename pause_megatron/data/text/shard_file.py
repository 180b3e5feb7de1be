"""Streaming reader of the lines of a plain, gzip or zstd shard; a damaged stream is never mistaken for its end."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pause_megatron.errors import DataError
from pause_megatron.files.digest import Hasher

SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 16
# Bound on decompressed data in memory: a few KiB of a compressed file can expand to gigabytes.
_MAX_DECOMPRESSED_BYTES = 1 << 20
# zstandard takes no such bound, but 4 compressed bytes cannot expand to more than 128 KiB.
_ZSTD_INPUT_BYTES = 1 << 10


class DamagedShard(DataError):
    """A shard that is truncated or corrupt inside its compressed stream, or unreadable.

    Attributes:
        reason: What is wrong, as a phrase without the path.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class _Decompressor(Protocol):
    """What the decompression objects of zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class ShardFile:
    """A reader that goes once through a shard, from front to back.

    Attributes:
        path: Path of the shard.
        read_bytes: Bytes of the file as stored, read so far.
        text_bytes: Bytes after decompression so far.
        line: Number of the last line that was yielded, from 1.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.read_bytes = 0
        self.text_bytes = 0
        self.line = 0
        self._hasher = Hasher()

    @property
    def digest(self) -> str:
        """Digest 'xxh3_128:HEX' of the bytes read so far, as stored."""
        return self._hasher.digest

    def lines(self, limit: int = MAX_LINE_BYTES) -> Iterator[bytes | None]:
        """Yield the lines without their newlines, in order; None for a line that is too long.

        Args:
            limit: Largest size of a line, in bytes.

        Yields:
            The bytes of each line, or None where it exceeds `limit`.

        Raises:
            DamagedShard: The file is damaged; raised after the last complete line that could be read.
        """
        parts: list[bytes] = []
        held = 0
        for block in self._blocks():
            self.text_bytes += len(block)
            first, *rest = block.split(b"\n")
            if held <= limit:
                parts.append(first)
            held += len(first)
            for piece in rest:
                self.line += 1
                yield b"".join(parts) if held <= limit else None
                parts, held = [piece], len(piece)
        if held:
            self.line += 1
            yield b"".join(parts) if held <= limit else None

    def _blocks(self) -> Iterator[bytes]:
        compression = compression_of(self.path)
        try:
            with open(self.path, "rb") as file:
                raw = self._raw_blocks(file)
                if compression is None:
                    yield from raw
                else:
                    yield from self._decompressed(raw, compression)
        except OSError as error:
            raise self._damaged(f"cannot be read ({error.strerror})") from None

    def _raw_blocks(self, file: BinaryIO) -> Iterator[bytes]:
        while block := file.read(_READ_BYTES):
            self.read_bytes += len(block)
            self._hasher.update(block)
            yield block

    def _decompressed(self, raw: Iterator[bytes], compression: str) -> Iterator[bytes]:
        # zlib and zstandard decompression objects share `decompress`, `eof` and `unused_data`. The file classes on top
        # of them are no alternative: zstandard's reader accepts a truncated file as complete.
        engine: _Decompressor | None = None
        begun = False
        for block in raw:
            begun = True
            while block:
                if engine is None:
                    if compression == ".gz" and self.text_bytes:
                        block = block.lstrip(b"\0")  # gzip allows padding after a member
                        if not block:
                            break
                    engine = _decompressor(compression)
                try:
                    block = yield from _DECOMPRESS[compression](engine, block)
                except _decompression_errors() as error:
                    raise self._damaged(f"damaged {compression} data ({error})") from None
                engine = None if engine.eof else engine
        if not begun:
            raise self._damaged(f"expected {compression} data, got an empty file")
        if engine is not None:
            raise self._damaged(f"truncated: the {compression} data stops before its end mark")

    def _damaged(self, reason: str) -> DamagedShard:
        message = (
            f"{self.path}: {reason}; readable up to line {self.line:,} ({self.text_bytes:,} bytes of text from "
            f"{self.read_bytes:,} bytes of the file). Fetch the shard again, or keep the readable part with "
            "--damaged-shards keep"
        )
        return DamagedShard(message, reason)


def compression_of(path: Path) -> str | None:
    """Return the compression that a shard's name implies: ".gz", ".zst", or None for a plain file.

    Raises:
        DataError: The name does not end in .json, .jsonl or .ndjson, optionally followed by .gz or .zst.
    """
    compression = path.suffix if path.suffix in COMPRESSIONS else None
    inner = path.with_suffix("").suffix if compression else path.suffix
    if inner not in SUFFIXES:
        raise DataError(
            f"{path}: expected a shard named {', '.join(SUFFIXES)}, plain or with .gz or .zst, got {path.name!r}"
        )
    return compression


def is_shard_name(name: str) -> bool:
    """Return whether `compression_of` accepts a name."""
    try:
        compression_of(Path(name))
    except DataError:
        return False
    return True


def check_start(path: Path) -> None:
    """Check that a shard can be opened, and that a compressed one begins with the magic bytes of its format.

    Raises:
        DataError: The file is unreadable, or holds other data under a .gz or .zst name (a Git LFS pointer, an HTML
            error page).
    """
    compression = compression_of(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if compression and not start.startswith(COMPRESSIONS[compression]):
        got = f"a file that begins with {start!r}" if start else "an empty file"
        raise DataError(f"{path}: expected {compression} data, got {got}; fetch the shard again")


def _decompressor(compression: str) -> _Decompressor:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _gunzip(engine: Any, block: bytes) -> Generator[bytes, None, bytes]:
    """Yield the decompressed block in bounded pieces; return the bytes after the end of the gzip member."""
    while True:
        piece = engine.decompress(block, _MAX_DECOMPRESSED_BYTES)
        yield piece
        block = engine.unconsumed_tail
        if engine.eof or (not block and len(piece) < _MAX_DECOMPRESSED_BYTES):
            return bytes(engine.unused_data)


def _unzstd(engine: Any, block: bytes) -> Generator[bytes, None, bytes]:
    """Yield the decompressed block in bounded pieces; return the bytes after the end of the zstd frame."""
    for start in range(0, len(block), _ZSTD_INPUT_BYTES):
        yield engine.decompress(block[start : start + _ZSTD_INPUT_BYTES])
        if engine.eof:
            return bytes(engine.unused_data) + block[start + _ZSTD_INPUT_BYTES :]
    return b""


_DECOMPRESS = {".gz": _gunzip, ".zst": _unzstd}


def _decompression_errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (zlib.error, zstandard.ZstdError)
