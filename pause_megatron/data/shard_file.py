"""Lines of a shard on disk, plain, gzip or zstd, with every kind of damage told apart from the end of the file."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pause_megatron.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 16


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
        engine = None
        for block in raw:
            while block:
                if engine is None:
                    if compression == ".gz" and self.text_bytes:
                        block = block.lstrip(b"\0")  # padding after a gzip member is allowed
                        if not block:
                            break
                    engine = _decompressor(compression)
                try:
                    yield engine.decompress(block)
                except _decompression_errors() as error:
                    raise self._damaged(f"damaged {compression} data ({error})") from None
                block = engine.unused_data if engine.eof else b""
                engine = None if engine.eof else engine
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


def _decompression_errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (zlib.error, zstandard.ZstdError)
