"""The vocabulary: which embedding rows and logit columns are text, pauses or padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pause_megatron.errors import ConfigError

Softmax = Literal["keep", "exclude"]


@dataclass(frozen=True)
class Vocabulary:
    """Text ids 0 .. text_size - 1, pause ids, and the padding that tensor parallelism needs.

    Attributes:
        text_size: Number of text ids.
        pause_ids: Ids of the pause embeddings; empty for a model without pauses. By default they follow the text ids.
    """

    text_size: int
    pause_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.text_size < 1:
            raise ConfigError(f"vocabulary: expected at least one text id, got text_size {self.text_size}")
        if len(set(self.pause_ids)) != len(self.pause_ids) or any(i < 0 for i in self.pause_ids):
            raise ConfigError(f"vocabulary: expected distinct pause ids of 0 or more, got {list(self.pause_ids)}")

    @property
    def size(self) -> int:
        """Number of live ids: text and pauses, without padding."""
        return max((self.text_size, *(i + 1 for i in self.pause_ids)))

    def padded(self, multiple: int, tensor_parallel: int) -> int:
        """Return the rows of the matrices: `size`, rounded up as in Megatron-LM.

        Args:
            multiple: The number of rows is a multiple of `multiple * tensor_parallel`.
            tensor_parallel: Tensor-parallel size.
        """
        step = multiple * tensor_parallel
        return -(-self.size // step) * step

    def masked_columns(self, softmax: Softmax, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the logit columns of a rank's shard that are masked out of the softmax.

        Padding is always masked; pauses are where `softmax` is "exclude".

        Args:
            softmax: "keep" or "exclude".
            start: First id of the shard.
            stop: Id after the last of the shard.

        Returns:
            Half-open ranges of columns relative to `start`, ascending, with gaps between them.
        """
        ranges = [(self.size, stop)]
        if softmax == "exclude":
            ranges += [(i, i + 1) for i in self.pause_ids]
        merged: list[tuple[int, int]] = []
        for low, high in sorted((max(a, start) - start, min(b, stop) - start) for a, b in ranges):
            if low >= high:
                continue
            if merged and merged[-1][1] == low:
                low = merged.pop()[0]
            merged.append((low, high))
        return merged
