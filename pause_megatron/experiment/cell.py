"""A cell of a grid: one call of one verb, and the fingerprint of everything that determines its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import xxhash

from pause_megatron import __version__

VERSION = 1
Verb = Literal["pretrain", "score", "finetune", "export-hf", "evaluate"]

PRODUCT: Mapping[str, str] = {
    **{"pretrain": "run", "score": "scores.safetensors", "finetune": "run", "export-hf": "hf", "evaluate": "results"}
}
"""The folder or file that a verb writes in its cell's folder."""

OUTPUT, INPUT, SCORES = "{output}", "{input}", "{scores}"
"""Placeholders in arguments for the cell's product, and for those of its input cell and of the cell of its scores."""


@dataclass(frozen=True)
class Estimate:
    """The cost of a cell, as far as the configuration determines it.

    Attributes:
        steps: Optimizer steps; None if unknown or if the verb takes none.
        raw_tokens: Text and pause tokens; None if unknown.
        flops_per_token: Model FLOPs of a raw token: forward and backward pass in training, forward pass in evaluation.
        parameters: Number of parameters of the model.
        about: What a pretraining spends in place of pauses, as text.
    """

    steps: int | None = None
    raw_tokens: int | None = None
    flops_per_token: float = 0.0
    parameters: int = 0
    about: str = ""

    @property
    def flops(self) -> float | None:
        """Model FLOPs of the cell; None if unknown."""
        return None if self.raw_tokens is None else self.raw_tokens * self.flops_per_token


@dataclass(frozen=True)
class Cell:
    """One call of one verb.

    Attributes:
        name: Name for messages and folders. Two grids may give one cell different names.
        verb: The verb.
        arguments: Arguments of the verb, with OUTPUT and INPUT as placeholders.
        identity: What determines the result, plain JSON: no paths, no hardware, nothing that affects only speed.
        input: The cell whose product this one reads; None for pretraining.
        scores: The cell of `score --task` whose values a finetuning reads as well; None for others.
        estimate: Its cost.
    """

    name: str
    verb: Verb
    arguments: tuple[str, ...]
    identity: Mapping[str, Any]
    input: Cell | None = None
    scores: Cell | None = None
    estimate: Estimate = field(default=Estimate(), compare=False)

    @property
    def inputs(self) -> tuple[Cell, ...]:
        """The cells whose products this one reads."""
        return tuple(cell for cell in (self.input, self.scores) if cell is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of verb, identity, the inputs' fingerprints and the package's version: 32 hexadecimal digits."""
        content = {
            "version": VERSION,
            "package": __version__,
            "verb": self.verb,
            "identity": self.identity,
            "input": self.input.fingerprint if self.input else None,
            **({"scores": self.scores.fingerprint} if self.scores else {}),
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    @property
    def folder_name(self) -> str:
        """Name of its folder in DIR/cells."""
        return f"{self.name}-{self.fingerprint[:8]}"
