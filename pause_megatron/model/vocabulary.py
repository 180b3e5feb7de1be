"""Which rows of the embedding and columns of the logits are text, pause or padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pause_megatron.errors import ConfigError

Softmax = Literal["keep", "exclude"]


@dataclass(frozen=True)
class Vocabulary:
    """Ordinary ids 0 .. text_size - 1, pause ids, and whatever padding tensor parallelism asks for.

    Attributes:
        text_size: number of ordinary ids.
        pause_ids: ids of the pause vectors; empty for a model without pauses. By default they follow the text.
    """

    text_size: int
    pause_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.text_size < 1:
            raise ConfigError(f"vocabulary: expected at least one ordinary id, got text_size {self.text_size}")
        if len(set(self.pause_ids)) != len(self.pause_ids) or any(i < 0 for i in self.pause_ids):
            raise ConfigError(f"vocabulary: expected distinct pause ids of 0 or more, got {list(self.pause_ids)}")

    @property
    def size(self) -> int:
        """Live ids: text and pauses, without padding."""
        return max((self.text_size, *(i + 1 for i in self.pause_ids)))

    def padded(self, multiple: int, tensor_parallel: int) -> int:
        """Rows of the matrices: `size`, rounded up to a multiple of `multiple * tensor_parallel` (as Megatron-LM)."""
        step = multiple * tensor_parallel
        return -(-self.size // step) * step

    def masked_columns(self, softmax: Softmax, start: int, stop: int) -> list[tuple[int, int]]:
        """Logit columns that take no part in the softmax, within a rank's shard.

        Padding never does (method, invariant 7), pauses do not when `softmax` is "exclude".

        Args:
            softmax: "keep" or "exclude".
            start, stop: global ids of the shard, stop exclusive.

        Returns:
            Half-open ranges of columns relative to `start`, ascending, not touching.
        """
        spans = [(self.size, stop)]
        if softmax == "exclude":
            spans += [(i, i + 1) for i in self.pause_ids]
        merged: list[tuple[int, int]] = []
        for low, high in sorted((max(a, start) - start, min(b, stop) - start) for a, b in spans):
            if low >= high:
                continue
            if merged and merged[-1][1] == low:
                low = merged.pop()[0]
            merged.append((low, high))
        return merged
