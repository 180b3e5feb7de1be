"""The file joined.bin in PREFIX.parts/, to which finished parts are appended in order; it becomes PREFIX.bin.

A part's own .bin is deleted as soon as its bytes are on disk in joined.bin, so joining needs room for the largest part,
not for a second corpus. joined.json states how many parts were joined. It is written after their bytes and before the
part is deleted: after a kill at any moment, each part is in joined.bin or in its own file. Bytes of joined.bin beyond
those that joined.json counts are truncated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.records import BLOCK_BYTES, BlockRecord, FileRecord, FrozenModel, read_record
from pause_megatron.data.prepare.shard import PartRecord, part_path
from pause_megatron.errors import DataError
from pause_megatron.files.digest import BlockDigests, Hasher
from pause_megatron.files.durable import READ_BYTES, write_whole


class JoinState(FrozenModel):
    """The content of `PREFIX.parts/joined.json`.

    Attributes:
        parts: Number of parts in joined.bin.
        bytes: Size of these parts.
    """

    parts: int = Field(ge=0)
    bytes: int = Field(ge=0)


@dataclass(frozen=True)
class JoinedBin:
    """A complete joined.bin, durable on disk.

    Attributes:
        path: Path of the file.
        file: Size and digest of the file.
        blocks: Digests of its blocks.
    """

    path: Path
    file: FileRecord
    blocks: BlockRecord


class JoinedFile:
    """The file joined.bin of a preparation, with its state in joined.json.

    Args:
        folder: PREFIX.parts/.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "joined.bin"
        self._state_path = folder / "joined.json"

    def recover(self, output: str | Path) -> int:
        """Return how many parts an earlier run has joined; their own files may be gone.

        Call this only while holding the lock of the corpus.

        Args:
            output: PREFIX of the corpus.
        """
        if not self._state_path.exists():
            return 0
        state = read_record(self._state_path, JoinState)
        published = path_of(output, "bin")
        # After a kill between the renames and the manifest, joined.bin is already PREFIX.bin.
        if not self._path.exists() and published.exists() and not path_of(output, "manifest.json").exists():
            os.replace(published, self._path)
        return state.parts if self._path.exists() and self._path.stat().st_size >= state.bytes else 0

    def keep(self, parts: Sequence[PartRecord]) -> None:
        """Keep only these joined parts; the parts after them are prepared again.

        Args:
            parts: The first parts of the corpus, in order.
        """
        state = JoinState(parts=len(parts), bytes=sum(part.bin.bytes for part in parts))
        if self._state_path.exists() and read_record(self._state_path, JoinState) != state:
            self._write_state(state)

    def join(self, parts: Sequence[PartRecord], on_progress: Callable[[int, int], None]) -> JoinedBin:
        """Append the parts that are not joined yet, and check the digests of all.

        Args:
            parts: All parts of the corpus, in order.
            on_progress: Called after every MiB with the number of parts and of bytes that are done.

        Raises:
            DataError: A part was altered on disk after it was written; the next run prepares it again.
        """
        state = JoinState(parts=0, bytes=0)
        if self._state_path.exists() and self._path.exists():
            state = read_record(self._state_path, JoinState)
        digests = _Digests()
        with open(self._path, "r+b" if state.parts else "w+b", buffering=0) as file:
            file.truncate(state.bytes)
            for number, part in enumerate(parts):
                own, joined = part_path(self._folder, number, "bin"), number < state.parts
                for block in _read(file, part.bin.bytes) if joined else _append(own, file):
                    digests.update(block)
                    on_progress(number, digests.bytes)
                if (digest := digests.end_part()) != part.bin.digest:
                    part_path(self._folder, number, "json").unlink()
                    raise DataError(
                        f"{self._path if joined else own}: expected digest {part.bin.digest}, got {digest}: altered on "
                        "disk after it was written; run the same command again to prepare it again"
                    )
                if not joined:
                    os.fsync(file.fileno())
                    self._write_state(JoinState(parts=number + 1, bytes=digests.bytes))
                own.unlink(missing_ok=True)
                on_progress(number + 1, digests.bytes)
        return JoinedBin(self._path, digests.file_record(), digests.block_record())

    def _write_state(self, state: JoinState) -> None:
        write_whole(self._state_path, state.model_dump_json().encode())


class _Digests:
    """Digests of joined.bin as a whole, of its blocks and of each part, computed in one pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self._whole, self._part = Hasher(), Hasher()
        self._blocks = BlockDigests(BLOCK_BYTES)

    def update(self, data: bytes) -> None:
        """Append bytes of the current part."""
        self._whole.update(data)
        self._part.update(data)
        self._blocks.update(data)
        self.bytes += len(data)

    def end_part(self) -> str:
        """Return the digest of the current part, and begin the next one."""
        digest = self._part.digest
        self._part = Hasher()
        return digest

    def file_record(self) -> FileRecord:
        return FileRecord(bytes=self.bytes, digest=self._whole.digest)

    def block_record(self) -> BlockRecord:
        return BlockRecord(bytes=self._blocks.block_bytes, digests=self._blocks.digests)


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file."""
    while size and (block := file.read(min(size, READ_BYTES))):
        size -= len(block)
        yield block


def _append(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Append a file to another one, and yield its bytes."""
    with open(path, "rb") as source:
        while block := source.read(READ_BYTES):
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
            yield block
