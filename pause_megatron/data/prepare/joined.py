"""PREFIX.parts/joined.bin: the parts joined so far, in order. It becomes PREFIX.bin.

A part's own .bin is given up as soon as its bytes are here and on the disk, so joining needs room for the largest part,
not for a second corpus. joined.json says how many parts are here. It is written after their bytes and before a part is
given up: killed at any moment, each part is here or in its own file. Bytes behind those that it counts are cut off.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash
from pydantic import Field

from pause_megatron.data.corpus.manifest import BLOCK_BYTES, BlockRecord, FileRecord, Record, path_of, read_record
from pause_megatron.data.prepare.shard import Part
from pause_megatron.errors import DataError
from pause_megatron.files.durable import READ_BYTES, BlockDigests, write_whole

_BIN, _RECORD = "joined.bin", "joined.json"


class Joined(Record):
    """`PREFIX.parts/joined.json`: parts in joined.bin, and their bytes."""

    parts: int = Field(ge=0)
    bytes: int = Field(ge=0)


def joined_parts(output: str | Path, folder: Path) -> int:
    """How many parts an earlier run has joined. Their own files may be gone. Call it while holding the lock only."""
    record, path, published = folder / _RECORD, folder / _BIN, path_of(output, "bin")
    if not record.exists():
        return 0
    joined = read_record(record, Joined)
    # Killed between the names and the manifest: the file is at its place already.
    if not path.exists() and published.exists() and not path_of(output, "manifest.json").exists():
        os.replace(published, path)
    return joined.parts if path.exists() and path.stat().st_size >= joined.bytes else 0


def keep_joined(folder: Path, parts: list[Part]) -> None:
    """Go on from these joined parts only: those behind them are prepared anew."""
    record = folder / _RECORD
    wanted = Joined(parts=len(parts), bytes=sum(part.bin.bytes for part in parts))
    if record.exists() and read_record(record, Joined) != wanted:
        write_whole(record, wanted.model_dump_json().encode())


def join_bins(
    folder: Path, parts: list[Part], on_progress: Callable[[int, int], None]
) -> tuple[Path, FileRecord, BlockRecord]:
    """Append to joined.bin what is not there yet, and read again what is.

    Args:
        folder: PREFIX.parts/.
        parts: all of them, in order.
        on_progress: called after each MiB or so with the parts and the bytes that are done.

    Returns:
        the file, with its bytes on the disk, and its digests.

    Raises:
        DataError: a part was altered on disk since it was written; it is prepared anew by the next run.
    """
    record, path = folder / _RECORD, folder / _BIN
    done = read_record(record, Joined) if record.exists() and path.exists() else Joined(parts=0, bytes=0)
    blocks, whole, size = BlockDigests(BLOCK_BYTES), xxhash.xxh3_128(), 0
    file = open(path, "r+b" if done.parts else "w+b", buffering=0)  # noqa: SIM115 - closed below
    with contextlib.closing(file):
        file.truncate(done.bytes)
        for number, part in enumerate(parts):
            here = number < done.parts
            own, digest = folder / f"{number:05d}.bin", xxhash.xxh3_128()
            for block in _blocks(file, part.bin.bytes) if here else _copied(own, file):
                digest.update(block)
                whole.update(block)
                blocks.update(block)
                size += len(block)
                on_progress(number, size)
            if f"xxh3_128:{digest.hexdigest()}" != part.bin.digest:
                own.with_suffix(".json").unlink()
                altered = path if here else own
                raise DataError(
                    f"{altered} was altered on disk after it was written; run the same command again to redo it"
                )
            if not here:
                os.fsync(file.fileno())
                write_whole(record, Joined(parts=number + 1, bytes=size).model_dump_json().encode())
            own.unlink(missing_ok=True)
            on_progress(number + 1, size)
    digests = BlockRecord(bytes=blocks.block_bytes, digests=blocks.digests)
    return path, FileRecord(bytes=size, digest=f"xxh3_128:{whole.hexdigest()}"), digests


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (block := file.read(min(size, READ_BYTES))):
        size -= len(block)
        yield block


def _copied(path: Path, file: BinaryIO) -> Iterator[bytes]:
    with open(path, "rb") as source:
        while block := source.read(READ_BYTES):
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
            yield block
