"""Synthetic task of the parity of n uniform random bits, with hints, as in London and Kanade (2025, arXiv:2505.21024).

A hint tells about the number of ones: hint i of n is "1" where at least i bits are ones ("threshold"), or where exactly
i are ("equality"), else "0". From all hints the parity follows by a linear map. With `finetune.pause_targets` pause i
predicts hint i, so n hints need n + 1 pauses. With `finetune.auxiliary_heads` heads at the answering position do.

Prompts are drawn without replacement. Every eighth, by a hash that is not linear in the bits, is for evaluation only.
The task is `task.name=pause_megatron.tasks.synthetic.parity:PARITY_OF_20` without `task.path`, where 20 may be any
number of bits. `PARITY_OF_20_EQUALITY` has the other hints, and `PARITY_OF_20_TRAIN_100000` so many training examples.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Literal

from pause_megatron.tasks.synthetic.base import SyntheticTask, unrelated_split_of
from pause_megatron.tasks.task import FinetuneDefaults, Split

EVALUATION = 2048
"""Examples of the evaluation split; with few bits there are fewer."""

_NAME = re.compile(r"PARITY_OF_([1-9]\d{0,3})(_EQUALITY)?(?:_TRAIN_([1-9]\d{0,7}))?")


@dataclass(frozen=True, kw_only=True)
class UniformParity(SyntheticTask):
    """The task of telling whether the number of ones among uniform random bits is odd.

    Attributes:
        hint: Question that hint i answers about the number of ones, i = 1..bits: at least i, or exactly i.
        train: Number of training examples; with few bits there are fewer.
        finetune: Defaults of finetuning: as many pauses as `finetune.pause_targets` needs.
    """

    hint: Literal["threshold", "equality"] = "threshold"
    train: int = 32_768
    finetune: FinetuneDefaults = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "finetune", FinetuneDefaults(pauses=self.bits + 1))

    @property
    def name(self) -> str:
        """Name in results; it seeds the examples too."""
        return f"parity_of_{self.bits}"

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield (bits, answer) of the examples of a split, in the same order in every run."""
        for bits in islice(self._prompts(split), self.train if split == "train" else EVALUATION):
            yield bits, str(bits.count("1") % 2)

    def hints(self, bits: str) -> tuple[str, ...]:
        """Return the hints of a prompt."""
        return _hints_of(bits.count("1"), self.bits, self.hint)

    def _prompts(self, split: Split) -> Iterator[str]:
        """Yield each prompt of a split once, in a random order."""
        draw = random.Random(f"{self.name} {self.seed} {split}")
        total = 2**self.bits
        if self.bits <= 16:
            numbers: Iterator[int] = iter(draw.sample(range(total), total))
        else:
            numbers = _distinct(draw, self.bits)
        for number in numbers:
            bits = f"{number:0{self.bits}b}"
            if unrelated_split_of(bits) == split:
                yield bits


@cache
def _hints_of(ones: int, bits: int, hint: str) -> tuple[str, ...]:
    """Return the hints of every prompt with so many ones: one tuple, however many prompts there are."""
    return tuple(str(int(ones >= i if hint == "threshold" else ones == i)) for i in range(1, bits + 1))


def _distinct(draw: random.Random, bits: int) -> Iterator[int]:
    """Yield all numbers of so many bits, each once, in a random order."""
    seen: set[int] = set()
    while len(seen) < 2**bits:
        number = draw.getrandbits(bits)
        if number not in seen:
            seen.add(number)
            yield number


def __getattr__(name: str) -> UniformParity:
    """Return the task of a name such as PARITY_OF_20."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; PARITY_OF_N has N bits")
    bits, equality, train = match.groups()
    task = UniformParity(bits=int(bits), hint="equality" if equality else "threshold")
    return replace(task, train=int(train)) if train else task
