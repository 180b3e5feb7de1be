"""The base class of synthetic tasks (bits in, one digit out) and their tokenizer."""

from __future__ import annotations

import hashlib
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
class SyntheticTask:
    """A `Task` whose prompt is bits and "=", and whose answer is one digit.

    Attributes:
        bits: Number of bits of a prompt, n.
        seed: Seed of the examples, which are the same in every run.
        kind: Always "generate".
        metrics: Names of the metrics.
        primary: The metric that tables show.
        decoding: One token is decoded.
        finetune: Defaults of finetuning.
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
        """Name in results; it seeds the examples too."""
        raise NotImplementedError

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield (bits, answer) of every example of a split, in the same order in every run."""
        raise NotImplementedError

    def hints(self, bits: str) -> tuple[str, ...]:
        """Return the hints of a prompt, one digit each; none by default."""
        return ()

    @property
    def folder(self) -> str:
        """Folder of records under `--task-path`; the task reads none."""
        return self.name

    def examples(self, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
        """Return examples of a split.

        Args:
            split: "train" or "eval".
            path: Must be None, because the examples are generated.
            limit: Number of examples from the start; None returns all.

        Raises:
            ConfigError: `path` is given.
        """
        if path is not None:
            raise ConfigError(f"task.path: expected none, task {self.name} generates its examples; got {path!r}")
        return [
            Example(id=str(number), prompt=f"{bits}=", target=answer, references=(answer,), hints=self.hints(bits))
            for number, (bits, answer) in enumerate(islice(self.pairs(split), limit), start=1)
        ]


def split_of(bits: str) -> Split:
    """Return the split of a prompt: by a hash, every eighth prompt is for evaluation and never trained on."""
    return "eval" if zlib.crc32(bits.encode()) % 8 == 0 else "train"


def unrelated_split_of(text: str) -> Split:
    """Return the split of a prompt as `split_of` does, by a hash that is no function that a task asks for.

    A bit of the CRC of `split_of` is itself the parity of some of a prompt's bits.
    """
    return "eval" if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 8 == 0 else "train"


def write_tokenizer(folder: str | Path) -> None:
    """Write a Hugging Face tokenizer with a token for each digit, for "=" and for the end of a document.

    Args:
        folder: Folder for tokenizer.json and tokenizer_config.json; give it as `data.tokenizer`.
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
