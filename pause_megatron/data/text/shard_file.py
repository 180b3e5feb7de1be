"""Lines of a shard on disk, plain, gzip or zstd, with every kind of damage told apart from the end of the file."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import xxhash

from pause_megatron.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 16
# Decompressed data that exists at one time: a few KiB of a compressed file can hold gigabytes of one letter.
_MOST_BYTES = 1 << 20
# zstandard has no such limit, but 4 bytes of it cannot give more than 128 KiB.
_ZSTD_BYTES = 1 << 10


class DamagedShard(DataError):
    """A shard that ends or breaks inside its compressed stream, or that the disk cannot read. `reason` is a phrase."""

    reason = ""


class ShardFile:
    """Reads a shard once, from front to back.

    Attributes:
        read_bytes: bytes of the file (as stored) read so far.
        text_bytes: bytes after decompression so far.
        line: number of the last line given out, from 1.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.read_bytes = 0
        self.text_bytes = 0
        self.line = 0
        self._hash = xxhash.xxh3_128()

    @property
    def digest(self) -> str:
        """Digest of the file as stored, once all of it was read; as 'xxh3_128:HEX'."""
        return f"xxh3_128:{self._hash.hexdigest()}"

    def lines(self, limit: int = MAX_LINE_BYTES) -> Iterator[bytes | None]:
        """Lines without their newline, in order; None for a line of more than `limit` bytes.

        Raises:
            DamagedShard: after the last whole line that could be read.
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

    def _raw_blocks(self, file) -> Iterator[bytes]:
        while block := file.read(_READ_BYTES):
            self.read_bytes += len(block)
            self._hash.update(block)
            yield block

    def _decompressed(self, raw: Iterator[bytes], compression: str) -> Iterator[bytes]:
        # zlib and zstandard decompression objects share `decompress`, `eof` and `unused_data`. The file classes on top
        # of them do not serve here: zstandard's reader takes a cut file for a complete one.
        engine, begun = None, False
        for block in raw:
            begun = True
            while block:
                if engine is None:
                    if compression == ".gz" and self.text_bytes:
                        block = block.lstrip(b"\0")  # padding after a gzip member is allowed
                        if not block:
                            break
                    engine = _decompressor(compression)
                try:
                    block = yield from _PIECES[compression](engine, block)
                except _decompression_errors() as error:
                    raise self._damaged(f"damaged {compression} data ({error})") from None
                engine = None if engine.eof else engine
        if not begun:
            raise self._damaged(f"empty: there is no {compression} data at all")
        if engine is not None:
            raise self._damaged(f"truncated: the {compression} data stops before its end mark")

    def _damaged(self, reason: str) -> DamagedShard:
        error = DamagedShard(
            f"{self.path}: {reason}; readable up to line {self.line:,} ({self.text_bytes:,} bytes of text from "
            f"{self.read_bytes:,} bytes of the file). Fetch the shard again, or keep what is readable with "
            "--damaged-shards keep"
        )
        error.reason = reason
        return error


def compression_of(path: Path) -> str | None:
    """ ".gz", ".zst" or None (plain), by the file's name.

    Raises:
        DataError: a name that is none of .json, .jsonl, .ndjson, each plain, .gz or .zst.
    """
    compression = path.suffix if path.suffix in COMPRESSIONS else None
    inner = path.with_suffix("").suffix if compression else path.suffix
    if inner not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of shard; expected {', '.join(SUFFIXES)}, plain or with .gz or .zst")
    return compression


def is_shard_name(name: str) -> bool:
    """Whether `compression_of` takes this name."""
    try:
        compression_of(Path(name))
    except DataError:
        return False
    return True


def check_start(path: Path) -> None:
    """Check that a shard can be opened and that a compressed one begins as its name says.

    Raises:
        DataError: unreadable, or something else under a .gz or .zst name (a Git LFS pointer, an error page).
    """
    compression = compression_of(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if compression and not start.startswith(COMPRESSIONS[compression]):
        what = f"it begins with {start!r}" if start else "it is empty"
        raise DataError(f"{path}: expected {compression} data, but {what}; fetch the shard again")


def _decompressor(compression: str):
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _gzip_pieces(engine, block: bytes) -> Generator[bytes, None, bytes]:
    """What a block holds, at most _MOST_BYTES at a time; returns what follows the end of the member."""
    while True:
        piece = engine.decompress(block, _MOST_BYTES)
        yield piece
        block = engine.unconsumed_tail
        if engine.eof or (not block and len(piece) < _MOST_BYTES):
            return engine.unused_data


def _zstd_pieces(engine, block: bytes) -> Generator[bytes, None, bytes]:
    """What a block holds, of _ZSTD_BYTES at a time; returns what follows the end of the frame."""
    for start in range(0, len(block), _ZSTD_BYTES):
        yield engine.decompress(block[start : start + _ZSTD_BYTES])
        if engine.eof:
            return engine.unused_data + block[start + _ZSTD_BYTES :]
    return b""


_PIECES = {".gz": _gzip_pieces, ".zst": _zstd_pieces}


def _decompression_errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (zlib.error, zstandard.ZstdError)
