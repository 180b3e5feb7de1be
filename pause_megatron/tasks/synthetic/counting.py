"""Synthetic task of counting the ones among n bits modulo q.

With q = 2 this is parity, which London and Kanade (2025, arXiv:2505.21024) use to separate transformers with pauses
from those without.

The number of ones is uniform on 0..n (fair coins would nearly always give about n/2); their positions are drawn next.
The task is `task.name=pause_megatron.tasks.synthetic.counting:MOD4_OF_24` without `task.path`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from pause_megatron.tasks.synthetic.base import SyntheticTask, split_of
from pause_megatron.tasks.task import FinetuneDefaults, Split

SIZES: Mapping[Split, int] = MappingProxyType({"train": 8192, "eval": 2048})
"""Number of examples of each split."""


@dataclass(frozen=True, kw_only=True)
class CountOnes(SyntheticTask):
    """The task of counting the ones among `bits` bits modulo `modulus`.

    Attributes:
        modulus: q, 2 to 10; an answer is one digit.
        finetune: Defaults of finetuning.
    """

    modulus: int
    finetune: FinetuneDefaults = field(default_factory=lambda: FinetuneDefaults(pauses=8))

    @property
    def name(self) -> str:
        """Name in results; it seeds the examples too."""
        return f"count_ones_{self.bits}_mod_{self.modulus}"

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield (bits, answer) of as many examples as `SIZES` gives for the split."""
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
    """Return the split of a prompt; all zeros and all ones, which have one arrangement only, are for training."""
    return "train" if len(set(bits)) == 1 else split_of(bits)


MOD4_OF_16 = CountOnes(bits=16, modulus=4)
MOD4_OF_24 = CountOnes(bits=24, modulus=4)
PARITY_OF_16 = CountOnes(bits=16, modulus=2)
