"""A synthetic task whose answer takes parallel work behind the prompt: how many of n bits are ones, modulo q?

With q = 2 this is parity, which London and Kanade (2025, arXiv:2505.21024) use to tell transformers with pauses from
those without. The remainder has n/q periods in the number of ones. Averaging over the prompt gives that number to one
attention head; to tell its n + 1 values apart takes hidden units at the position that answers, of which a narrow model
has few. Each pause is a position with as many again. `tests/benchmarks/pauses_matter.py` measures what that brings.

Numbers of ones are drawn evenly from 0 to n (fair coins would nearly always give about n/2), then their places.
Examples are made, not read: `task.name=pause_megatron.tasks.counting:MOD4_OF_24`, no `task.path`.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pause_megatron.errors import ConfigError
from pause_megatron.tasks.task import Decoding, Example, FinetuneDefaults, Split

SIZES: Mapping[Split, int] = MappingProxyType({"train": 8192, "eval": 2048})
"""Examples of each split."""


@dataclass(frozen=True, kw_only=True)
class CountOnes:
    """The remainder of the number of ones among `bits` bits, divided by `modulus`. A `Task`.

    A prompt belongs to one split, whichever examples are drawn: evaluation prompts are never trained on.

    Attributes:
        bits: n, bits of a prompt.
        modulus: q, 2 to 10; an answer is one digit.
        seed: of the examples, which are the same in every run.
    """

    bits: int
    modulus: int
    seed: int = 0
    kind: Literal["generate"] = "generate"
    metrics: tuple[str, ...] = ("exact_match",)
    primary: str = "exact_match"
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=1))
    finetune: FinetuneDefaults = field(default_factory=lambda: FinetuneDefaults(pauses=8))

    @property
    def name(self) -> str:
        """For results, and what the examples' draws depend on."""
        return f"count_ones_{self.bits}_mod_{self.modulus}"

    @property
    def folder(self) -> str:
        """Where records would lie; none do."""
        return self.name

    def examples(self, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
        """The first `limit` (None: all of SIZES) examples of a split.

        Raises:
            ConfigError: a `path`; nothing is read.
        """
        if path is not None:
            raise ConfigError(f"task.path: expected none, task {self.name} makes its examples; came {path!r}")
        drawn = islice(self._prompts(split), SIZES[split] if limit is None else min(limit, SIZES[split]))
        return [self._example(str(number), bits) for number, bits in enumerate(drawn, start=1)]

    def _prompts(self, split: Split) -> Iterator[str]:
        draw = random.Random(f"{self.name} {self.seed} {split}")
        while True:
            ones = draw.randint(0, self.bits)
            for _ in range(100):
                bits = "".join(draw.sample("1" * ones + "0" * (self.bits - ones), self.bits))
                if _split_of(bits) == split:
                    yield bits
                    break

    def _example(self, name: str, bits: str) -> Example:
        answer = str(bits.count("1") % self.modulus)
        return Example(id=name, prompt=f"{bits}=", target=answer, references=(answer,))


def _split_of(bits: str) -> Split:
    """Every eighth prompt, by a hash, is for evaluation; the two without a choice of places are for training."""
    if len(set(bits)) == 1:
        return "train"
    return "eval" if zlib.crc32(bits.encode()) % 8 == 0 else "train"


MOD4_OF_16 = CountOnes(bits=16, modulus=4)
MOD4_OF_24 = CountOnes(bits=24, modulus=4)
PARITY_OF_16 = CountOnes(bits=16, modulus=2)


def write_tokenizer(folder: str | Path) -> None:
    """A Hugging Face tokenizer with a token for each digit, for "=" and the end of a text.

    Args:
        folder: where tokenizer.json and tokenizer_config.json go; for `data.tokenizer`.
    """
    pieces = ["<unk>", "</s>", *"0123456789="]
    special = [
        {"id": number, "content": piece, "special": True, **dict.fromkeys(_FLAGS, False)}
        for number, piece in enumerate(pieces[:2])
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "unk_token": "<unk>",
        },
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", document), ("tokenizer_config.json", names)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
