"""What synthetic tasks share: bits in, one digit out, examples that are made and not read, and a tokenizer for them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from pause_megatron.errors import ConfigError
from pause_megatron.tasks.task import Decoding, Example, FinetuneDefaults, Split


@dataclass(frozen=True, kw_only=True)
class MadeTask:
    """A `Task` whose prompt is bits and "=", and whose answer is one digit.

    Attributes:
        bits: n, of a prompt.
        seed: of the examples, which are the same in every run.
    """

    bits: int
    seed: int = 0
    kind: Literal["generate"] = "generate"
    metrics: tuple[str, ...] = ("exact_match",)
    primary: str = "exact_match"
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=1))
    finetune: FinetuneDefaults = field(default_factory=FinetuneDefaults)

    @property
    def name(self) -> str:
        """For results, and what the examples' draws depend on."""
        raise NotImplementedError

    def answered(self, split: Split) -> Iterator[tuple[str, str]]:
        """(bits, answer) of all examples of a split, in an order that is the same in every run."""
        raise NotImplementedError

    @property
    def folder(self) -> str:
        """Where records would lie; none do."""
        return self.name

    def examples(self, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
        """The first `limit` (None: all) examples of a split.

        Raises:
            ConfigError: a `path`; nothing is read.
        """
        if path is not None:
            raise ConfigError(f"task.path: expected none, task {self.name} makes its examples; came {path!r}")
        return [
            Example(id=str(number), prompt=f"{bits}=", target=answer, references=(answer,))
            for number, (bits, answer) in enumerate(islice(self.answered(split), limit), start=1)
        ]


def split_of(bits: str) -> Split:
    """Every eighth prompt, by a hash, is for evaluation, whichever examples are drawn: it is never trained on."""
    return "eval" if zlib.crc32(bits.encode()) % 8 == 0 else "train"


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
