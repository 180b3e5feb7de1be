"""Running sums of every shard, shared between the workers of `prepare` and their parent process."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import NamedTuple


class ShardSums(NamedTuple):
    """Running sums of one shard, or of all.

    Attributes:
        documents: Number of documents.
        tokens: Number of token ids, EODs included.
        text_bytes: Size of the text as UTF-8.
        read_bytes: Bytes read of the source as stored.
        malformed: Number of malformed lines.
    """

    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int
    malformed: int


class SharedCounters:
    """The running sums of every shard, in memory that the workers share.

    Each cell has one writer, so no lock is needed: a worker that is killed could hold it for ever.

    Args:
        cells: Shared integers, `SharedCounters.size` of them.
    """

    def __init__(self, cells: MutableSequence[int]) -> None:
        self.cells = cells

    @staticmethod
    def size(shards: int) -> int:
        """Return the number of cells: one row per shard, and the stop flag."""
        return shards * len(ShardSums._fields) + 1

    def set(self, shard: int, sums: ShardSums) -> None:
        """Publish the sums of a shard.

        Args:
            shard: Number of the shard, from 0.
            sums: Its sums so far.
        """
        start = shard * len(sums)
        for offset, value in enumerate(sums):
            self.cells[start + offset] = value

    def total(self) -> ShardSums:
        """Return the sums over all shards."""
        columns, end = len(ShardSums._fields), len(self.cells) - 1
        return ShardSums(*(sum(self.cells[column:end:columns]) for column in range(columns)))

    @property
    def stopped(self) -> bool:
        """Whether the workers must stop after the current batch."""
        return bool(self.cells[len(self.cells) - 1])

    def stop(self) -> None:
        """Request that the workers stop after the current batch."""
        self.cells[len(self.cells) - 1] = 1
