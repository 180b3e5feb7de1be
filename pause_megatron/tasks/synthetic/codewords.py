"""A synthetic task whose answer takes several looks at the prompt: which codeword was sent?

A prompt is a codeword of n bits with t of them flipped; the answer is the codeword's number. Any two codewords differ
in at least 2 t + 1 places, so that exactly one lies that near. The best decoder weighs the bits, by place, with another
set of weights (of both signs) for each codeword. One attention head at the position that answers gives one set of
weights, which are positive; each pause gives another. `tests/benchmarks/pauses_matter.py` measures what that brings.

All prompts are enumerated and every eighth, by a hash, is for evaluation only.
Examples are made, not read: `task.name=pause_megatron.tasks.synthetic.codewords:CODE_OF_16`, no `task.path`.
The tokens are those of `made.write_tokenizer`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from pause_megatron.errors import ConfigError
from pause_megatron.tasks.synthetic.base import MadeTask, split_of
from pause_megatron.tasks.task import FinetuneDefaults, Split


@dataclass(frozen=True, kw_only=True)
class Decode(MadeTask):
    """The number of the codeword that was sent.

    Codewords have as many ones as zeros and are drawn at random, each far enough from those before it.

    Attributes:
        bits: n, of a codeword; even.
        words: q, of the code, 2 to 10; an answer is one digit.
        flips: t, bits that differ from the codeword in each prompt.
    """

    words: int
    flips: int
    finetune: FinetuneDefaults = field(default_factory=lambda: FinetuneDefaults(pauses=16))

    @property
    def name(self) -> str:
        """For results, and what the code and the order of examples depend on."""
        return f"decode_{self.words}_of_{self.bits}_flipped_{self.flips}"

    def code(self) -> list[str]:
        """The codewords.

        Raises:
            ConfigError: there are not so many, so far apart.
        """
        draw = random.Random(f"{self.name} {self.seed} code")
        half, found = self.bits // 2, []
        for _ in range(100_000):
            word = "".join(draw.sample("0" * half + "1" * half, self.bits))
            if all(_distance(word, other) > 2 * self.flips for other in found):
                found.append(word)
            if len(found) == self.words:
                return found
        raise ConfigError(f"task {self.name}: expected words {2 * self.flips + 1} apart; came {len(found)} of them")

    def answered(self, split: Split) -> Iterator[tuple[str, str]]:
        """All of them; they are enumerated, then shuffled."""
        mine = [(bits, answer) for bits, answer in self._prompts() if split_of(bits) == split]
        random.Random(f"{self.name} {self.seed} {split}").shuffle(mine)
        return iter(mine)

    def _prompts(self) -> Iterator[tuple[str, str]]:
        for number, word in enumerate(self.code()):
            for flipped in combinations(range(self.bits), self.flips):
                yield "".join(str(int(bit) ^ (place in flipped)) for place, bit in enumerate(word)), str(number)


def _distance(left: str, right: str) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


CODE_OF_16 = Decode(bits=16, words=8, flips=3)
