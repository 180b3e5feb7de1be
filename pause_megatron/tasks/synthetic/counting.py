"""A synthetic task whose answer takes parallel work behind the prompt: how many of n bits are ones, modulo q?

With q = 2 this is parity, which London and Kanade (2025, arXiv:2505.21024) use to tell transformers with pauses from
those without. The remainder has n/q periods in the number of ones. Averaging over the prompt gives that number to one
attention head; to tell its n + 1 values apart takes hidden units at the position that answers, of which a narrow model
has few. Each pause is a position with as many again. `tests/benchmarks/pauses_matter.py` measures what that brings.

Numbers of ones are drawn evenly from 0 to n (fair coins would nearly always give about n/2), then their places.
Examples are made, not read: `task.name=pause_megatron.tasks.synthetic.counting:MOD4_OF_24`, no `task.path`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from pause_megatron.tasks.synthetic.base import MadeTask, split_of
from pause_megatron.tasks.task import FinetuneDefaults, Split

SIZES: Mapping[Split, int] = MappingProxyType({"train": 8192, "eval": 2048})
"""Examples of each split."""


@dataclass(frozen=True, kw_only=True)
class CountOnes(MadeTask):
    """The remainder of the number of ones among `bits` bits, divided by `modulus`.

    Attributes:
        modulus: q, 2 to 10; an answer is one digit.
    """

    modulus: int
    finetune: FinetuneDefaults = field(default_factory=lambda: FinetuneDefaults(pauses=8))

    @property
    def name(self) -> str:
        """For results, and what the examples' draws depend on."""
        return f"count_ones_{self.bits}_mod_{self.modulus}"

    def answered(self, split: Split) -> Iterator[tuple[str, str]]:
        """As many as SIZES says."""
        for bits in islice(self._prompts(split), SIZES[split]):
            yield bits, str(bits.count("1") % self.modulus)

    def _prompts(self, split: Split) -> Iterator[str]:
        draw = random.Random(f"{self.name} {self.seed} {split}")
        while True:
            ones = draw.randint(0, self.bits)
            for _ in range(100):
                bits = "".join(draw.sample("1" * ones + "0" * (self.bits - ones), self.bits))
                if _split_of(bits) == split:
                    yield bits
                    break


def _split_of(bits: str) -> Split:
    """The two prompts without a choice of places are for training."""
    return "train" if len(set(bits)) == 1 else split_of(bits)


MOD4_OF_16 = CountOnes(bits=16, modulus=4)
MOD4_OF_24 = CountOnes(bits=24, modulus=4)
PARITY_OF_16 = CountOnes(bits=16, modulus=2)
