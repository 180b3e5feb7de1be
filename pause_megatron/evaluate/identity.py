"""How a task is evaluated, and everything that the outcomes of an evaluation depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import xxhash

from pause_megatron.errors import DataError

VERSION = 1
HARNESS = "pause-megatron"
Split = Literal["eval", "held-out"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The pauses of an evaluation, and the dtype of the model.

    Attributes:
        pauses: Number of pauses, M.
        location: "append" or "prepend".
        filler: Text of the token that replaces `<pause>`; None for pauses.
        prefix_attention: "causal" or "bidirectional".
        seed: Label of this evaluation, such as the seed of the finetuning. Answers do not depend on it.
        dtype: Dtype of the weights: "fp32", "bf16" or "fp16".
        split: "eval", or "held-out": the part of the train split that finetuning holds out.
        decoding: Pauses within answers: the fields of `DecodingPauses` that are set, as JSON; "" for none.
    """

    pauses: int
    location: str = "append"
    filler: str | None = None
    prefix_attention: str = "causal"
    seed: int = 0
    dtype: str = "fp32"
    split: Split = "eval"
    decoding: str = ""

    def document(self) -> dict[str, Any]:
        """Return the settings as plain JSON; newer keys only where they are set, as before there were these keys."""
        newer = {"split": "eval", "decoding": ""}
        return {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}

    def name(self, task: str) -> str:
        """Return the stem of the samples files of a task under these settings."""
        filler = "" if self.filler is None else f"-filler-{quote(self.filler, safe='')}"
        attention = "" if self.prefix_attention == "causal" else f"-{self.prefix_attention}"
        dtype = "" if self.dtype == "fp32" else f"-{self.dtype}"
        stem = quote(task.replace("/", "."), safe="")
        split = "" if self.split == "eval" else f"-{self.split}"
        decoding = self.decoding and f"-decoding-{xxhash.xxh3_64(self.decoding.encode()).hexdigest()}"
        return f"{stem}-m{self.pauses}-{self.location}{filler}{attention}{decoding}{dtype}{split}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class OwnDecoding:
    """What decides the outcomes of a task of this project, besides its examples.

    Attributes:
        max_new_tokens: Length limit of an answer, tokens.
        stop: Texts that end an answer.
        metrics: Names of the metrics.
        code: Digest of the code of each metric of one's own.
        few_shot: Solved examples before each prompt.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    metrics: tuple[str, ...]
    code: Mapping[str, str] = field(default_factory=dict)
    few_shot: int = 0


@dataclass(frozen=True, kw_only=True)
class HarnessDecoding:
    """What decides the outcomes of an lm-eval task, besides its records.

    Attributes:
        limit: Number of records of each task; None for all.
        versions: Version of each task.
    """

    limit: int | None
    versions: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that the outcomes of a task depend on.

    Attributes:
        task: Name of the task.
        model: Fingerprint of the model folder.
        data: Fingerprint of the examples.
        settings: Pauses and dtype.
        decoding: Decoding and metrics.
        harness: "pause-megatron", or "lm-eval VERSION".
    """

    task: str
    model: str
    data: str
    settings: Settings
    decoding: OwnDecoding | HarnessDecoding
    harness: str = HARNESS

    def document(self) -> dict[str, Any]:
        """Return the identity as plain JSON, the content of samples/NAME.json; newer keys only where they are set."""
        plain = {**asdict(self), "settings": self.settings.document()}
        for name in ("code", "few_shot"):
            if not plain["decoding"].get(name, True):
                del plain["decoding"][name]
        return {"version": VERSION, **json.loads(json.dumps(plain))}


def digest(document: Mapping[str, Any]) -> str:
    """Return the digest of an identity as 32 hex digits; every line of a samples file carries it."""
    return xxhash.xxh3_128(json.dumps(document, sort_keys=True).encode()).hexdigest()


def refuse_mismatch(path: Path, expected: Mapping[str, Any], stored: Mapping[str, Any], prefix: str = "") -> None:
    """Check that a file belongs to this evaluation.

    Args:
        path: The file, for messages.
        expected: Identity of this evaluation, plain JSON.
        stored: Identity in the file.
        prefix: Dotted path of the compared objects, for messages.

    Raises:
        DataError: A field differs. Names the field and both values.
    """
    for name in [*expected, *(set(stored) - set(expected))]:
        ours, theirs = expected.get(name), stored.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            refuse_mismatch(path, ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            raise DataError(
                f"{path}: {prefix}{name}: expected {ours!r} (this run), got {theirs!r}: the results are from a "
                f"different model, dataset or settings; give another --output, or remove them"
            )
