"""Synthetic task of finding whether two sets meet at a shift that is named last, with a hint for each place.

A prompt is the n bits of a set x, the n + S - 1 bits of a set y, a shift s and "=". The answer is "1" where some place
j has x[j] = 1 and y[j + s] = 1, else "0". Hint j is x[j] + y[j + s]. Bits are independent and 1 with probability 0.3.
The shift is written as the digit s + 2. As it comes after both sets, no position before it knows which bits meet.

Prompts are drawn without replacement; every eighth, by a hash, is for evaluation only. The task is
`task.name=pause_megatron.tasks.synthetic.sets:MEETING_OF_7` without `task.path`; its tokenizer is
`base.write_tokenizer`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from pause_megatron.tasks.synthetic.base import SyntheticTask, unrelated_split_of
from pause_megatron.tasks.task import FinetuneDefaults, Split

SIZES: Mapping[Split, int] = MappingProxyType({"train": 32_768, "eval": 3_072})
"""Number of examples of each split."""

ONES = 0.3


@dataclass(frozen=True, kw_only=True)
class Meeting(SyntheticTask):
    """The task of telling whether a set meets another one at a shift.

    Attributes:
        bits: Number of places of the first set, n.
        shifts: Number of shifts, S, 1 to 8; a shift is one digit.
        finetune: Defaults of finetuning: as many pauses as `finetune.pause_targets` needs.
    """

    shifts: int
    finetune: FinetuneDefaults = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "finetune", FinetuneDefaults(pauses=self.bits + 1))

    @property
    def name(self) -> str:
        """Name in results; it seeds the examples too."""
        return f"sets_of_{self.bits}_meet_at_{self.shifts}_shifts"

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield (both sets and the shift, answer) of as many examples as `SIZES` gives for the split."""
        for text in islice(self._prompts(split), SIZES[split]):
            yield text, str(int("2" in self.hints(text)))

    def hints(self, bits: str) -> tuple[str, ...]:
        """Return the hints of a prompt: how many of the two sets have each place."""
        one, other, shift = bits[: self.bits], bits[self.bits : -1], int(bits[-1]) - 2
        return tuple(_SUM[a + b] for a, b in zip(one, other[shift : shift + self.bits], strict=True))

    def _prompts(self, split: Split) -> Iterator[str]:
        draw, seen = random.Random(f"{self.name} {self.seed} {split}"), set()
        size = 2 * self.bits + self.shifts - 1
        while True:
            sets = "".join("1" if draw.random() < ONES else "0" for _ in range(size))
            text = f"{sets}{draw.randrange(self.shifts) + 2}"
            if text not in seen and unrelated_split_of(text) == split:
                seen.add(text)
                yield text


_SUM = {"00": "0", "01": "1", "10": "1", "11": "2"}


MEETING_OF_7 = Meeting(bits=7, shifts=8)
