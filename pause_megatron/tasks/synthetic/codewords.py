"""Synthetic task of decoding a noisy codeword, whose bits a decoder weighs differently for each codeword.

A prompt is a codeword of n bits with t of them flipped; the answer is the codeword's number. Any two codewords differ
in at least 2 t + 1 bits, so exactly one codeword is t flips away. `tests/benchmarks/pauses_matter` compares models with
pauses on it with controls of as many FLOPs.

All prompts are enumerated, and every eighth, by a hash, is for evaluation only. The task is
`task.name=pause_megatron.tasks.synthetic.codewords:CODE_OF_16` without `task.path`; its tokenizer is
`base.write_tokenizer`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from pause_megatron.errors import ConfigError
from pause_megatron.tasks.synthetic.base import SyntheticTask, split_of
from pause_megatron.tasks.task import FinetuneDefaults, Split


@dataclass(frozen=True, kw_only=True)
class Decode(SyntheticTask):
    """The task of finding the number of the codeword nearest to the prompt.

    Codewords have as many ones as zeros. They are drawn at random, each far enough from the earlier ones.

    Attributes:
        bits: Number of bits of a codeword, n; even.
        words: Number of codewords, q, 2 to 10; an answer is one digit.
        flips: Number of flipped bits in each prompt, t.
        finetune: Defaults of finetuning.
    """

    words: int
    flips: int
    finetune: FinetuneDefaults = field(default_factory=lambda: FinetuneDefaults(pauses=16))

    @property
    def name(self) -> str:
        """Name in results; it seeds the code and the order of examples too."""
        return f"decode_{self.words}_of_{self.bits}_flipped_{self.flips}"

    def code(self) -> list[str]:
        """Return the codewords.

        Raises:
            ConfigError: No code of that many words at that distance was found.
        """
        draw = random.Random(f"{self.name} {self.seed} code")
        half = self.bits // 2
        found: list[str] = []
        for _ in range(100_000):
            word = "".join(draw.sample("0" * half + "1" * half, self.bits))
            if all(_distance(word, other) > 2 * self.flips for other in found):
                found.append(word)
            if len(found) == self.words:
                return found
        wanted = f"{self.words} words {2 * self.flips + 1} apart"
        raise ConfigError(f"task {self.name}: expected {wanted}, got {len(found)}; give fewer words or flips")

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield (bits, answer) of every prompt of a split in a shuffled order."""
        pairs = [(bits, answer) for bits, answer in self._prompts() if split_of(bits) == split]
        random.Random(f"{self.name} {self.seed} {split}").shuffle(pairs)
        return iter(pairs)

    def _prompts(self) -> Iterator[tuple[str, str]]:
        for number, word in enumerate(self.code()):
            for flipped in combinations(range(self.bits), self.flips):
                yield "".join(str(int(bit) ^ (index in flipped)) for index, bit in enumerate(word)), str(number)


def _distance(left: str, right: str) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


CODE_OF_16 = Decode(bits=16, words=8, flips=3)
