"""Full verification of a corpus or a side array: every byte is read and compared with the digests of the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.records import BlockRecord, FileRecord
from pause_megatron.errors import DataError
from pause_megatron.files.digest import file_digest
from pause_megatron.terminal.progress import Report, no_report


class Digested(Protocol):
    """Files at a PREFIX that are verified together: those of a `Corpus`, or the one of a `SideArray`."""

    @property
    def prefix(self) -> str:
        """PREFIX of the corpus."""

    @property
    def title(self) -> str:
        """What it is, for messages."""

    @property
    def label(self) -> str:
        """Its short name, for progress."""

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and digest of each file by extension."""

    @property
    def blocks(self) -> Mapping[str, BlockRecord]:
        """Digests of the blocks of a file by extension, for files that have them."""

    @property
    def remedy(self) -> str:
        """What to do if it is damaged."""


@dataclass(frozen=True)
class Damage:
    """A damaged range of bytes of a file.

    Attributes:
        path: Path of the file.
        start: First byte of the range.
        end: End of the range, exclusive.
        block: Index of the damaged block, from 0.
        blocks: Number of blocks of the file.
        reason: What is wrong.
    """

    path: Path
    start: int
    end: int
    block: int
    blocks: int
    reason: str

    def __str__(self) -> str:
        where = f" (block {self.block + 1:,} of {self.blocks:,})" if self.blocks > 1 else ""
        return f"{self.path}: bytes {self.start:,} to {self.end:,}{where}: {self.reason}"


def damage_of(digested: Digested, report: Report = no_report) -> list[Damage]:
    """Read files whole and return their damaged blocks, in order.

    An `.idx`, a side array, and a `.bin` of a manifest of version 1, is a single block.

    Args:
        digested: An opened corpus or a side array, whose file sizes have been checked.
        report: Called after every MiB.
    """
    total = sum(record.bytes for record in digested.files.values())
    done = 0

    def on_read(size: int) -> None:
        nonlocal done
        done += size
        report(f"verify {digested.label}", done, total)

    found: list[Damage] = []
    for name, record in digested.files.items():
        digests, block_bytes = [record.digest], max(record.bytes, 1)
        if (blocks := digested.blocks.get(name)) is not None:
            digests, block_bytes = blocks.digests, blocks.bytes
        found += _damaged_blocks(path_of(digested.prefix, name), record.bytes, digests, block_bytes, on_read)
    return found


def verify_corpus(corpus: Corpus, report: Report = no_report) -> None:
    """Read the `.bin` and the `.idx` whole and check their digests.

    Args:
        corpus: An opened corpus.
        report: Called after every MiB.

    Raises:
        DataError: The corpus is damaged; the message lists every damaged range.
    """
    raise_if_damaged(corpus, damage_of(corpus, report))


def raise_if_damaged(digested: Digested, damage: Sequence[Damage]) -> None:
    """Raise an error that lists every damaged range, if there is one.

    Args:
        digested: The corpus or side array that was read.
        damage: Its damaged ranges, as `damage_of` returns them.

    Raises:
        DataError: `damage` is not empty.
    """
    if damage:
        raise DataError(describe_damage(digested, damage))


def describe_damage(digested: Digested, damage: Sequence[Damage]) -> str:
    """Return an error message with one line per damaged range.

    Args:
        digested: The corpus or side array that was read.
        damage: Its damaged ranges, as `damage_of` returns them.
    """
    lines = "\n  ".join(map(str, damage))
    return f"{digested.title} is damaged; {digested.remedy}:\n  {lines}"


def _damaged_blocks(
    path: Path, size: int, digests: Sequence[str], block_bytes: int, on_read: Callable[[int], None]
) -> Iterator[Damage]:
    for number, expected in enumerate(digests):
        start, end = number * block_bytes, min((number + 1) * block_bytes, size)
        actual: str | None
        try:
            actual = file_digest(path, start, end, on_read)
            reason = f"altered since it was written (expected {expected}, got {actual})"
        except OSError as error:
            actual, reason = None, f"cannot be read ({error.strerror})"
        if actual != expected:
            yield Damage(path, start, end, number, len(digests), reason)
