"""A synthetic task whose answer takes several looks at the prompt: which codeword was sent?

A prompt is a codeword of n bits with t of them flipped; the answer is the codeword's number. Any two codewords differ
in at least 2 t + 1 places, so that exactly one lies that near. The best decoder weighs the bits, by place, with another
set of weights (of both signs) for each codeword. One attention head at the position that answers gives one set of
weights, which are positive; each pause gives another. `tests/benchmarks/pauses_matter.py` measures what that brings.

All prompts are enumerated and every eighth, by a hash, is for evaluation only.
Examples are made, not read: `task.name=pause_megatron.tasks.codewords:CODE_OF_16`, no `task.path`.
The tokens are those of `counting.write_tokenizer`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from pause_megatron.errors import ConfigError
from pause_megatron.tasks.task import Decoding, Example, FinetuneDefaults, Split


@dataclass(frozen=True, kw_only=True)
class Decode:
    """The number of the codeword that was sent. A `Task`.

    Codewords have as many ones as zeros and are drawn at random, each far enough from those before it.

    Attributes:
        bits: n, of a codeword; even.
        words: q, of the code, 2 to 10; an answer is one digit.
        flips: t, bits that differ from the codeword in each prompt.
        seed: of the code and of the examples' order.
    """

    bits: int
    words: int
    flips: int
    seed: int = 0
    kind: Literal["generate"] = "generate"
    metrics: tuple[str, ...] = ("exact_match",)
    primary: str = "exact_match"
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=1))
    finetune: FinetuneDefaults = field(default_factory=lambda: FinetuneDefaults(pauses=16))

    @property
    def name(self) -> str:
        """For results, and what the code and the order of examples depend on."""
        return f"decode_{self.words}_of_{self.bits}_flipped_{self.flips}"

    @property
    def folder(self) -> str:
        """Where records would lie; none do."""
        return self.name

    def code(self) -> list[str]:
        """The codewords."""
        draw = random.Random(f"{self.name} {self.seed} code")
        half, found = self.bits // 2, []
        for _ in range(100_000):
            word = "".join(draw.sample("0" * half + "1" * half, self.bits))
            if all(_distance(word, other) > 2 * self.flips for other in found):
                found.append(word)
            if len(found) == self.words:
                return found
        raise ConfigError(f"task {self.name}: expected words {2 * self.flips + 1} apart; came {len(found)} of them")

    def examples(self, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
        """The first `limit` (None: all) examples of a split, in a random order.

        Raises:
            ConfigError: a `path`; nothing is read. A code that does not exist.
        """
        if path is not None:
            raise ConfigError(f"task.path: expected none, task {self.name} makes its examples; came {path!r}")
        mine = [(bits, answer) for bits, answer in self._prompts() if _split_of(bits) == split]
        random.Random(f"{self.name} {self.seed} {split}").shuffle(mine)
        return [
            Example(id=str(number), prompt=f"{bits}=", target=answer, references=(answer,))
            for number, (bits, answer) in enumerate(mine[:limit], start=1)
        ]

    def _prompts(self) -> Iterator[tuple[str, str]]:
        for number, word in enumerate(self.code()):
            for flipped in combinations(range(self.bits), self.flips):
                yield "".join(str(int(bit) ^ (place in flipped)) for place, bit in enumerate(word)), str(number)


def _distance(left: str, right: str) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


def _split_of(bits: str) -> Split:
    return "eval" if zlib.crc32(bits.encode()) % 8 == 0 else "train"


CODE_OF_16 = Decode(bits=16, words=8, flips=3)
