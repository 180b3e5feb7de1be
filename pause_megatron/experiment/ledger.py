"""Costs of a cell (model FLOPs, tokens, pauses, time), read from what its verb wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pause_megatron.data.supervised.answer_values import AnswerValues
from pause_megatron.errors import DataError
from pause_megatron.evaluate.results import read_results
from pause_megatron.files.metrics_lines import NAME, read_metrics
from pause_megatron.files.typed_json import Number


@dataclass(frozen=True)
class Ledger:
    """Costs of a cell, or of several together.

    Attributes:
        flops: Model FLOPs as `config.presets.flops_per_token` counts them; evaluation counts forward passes only.
        raw_tokens: Tokens through the model: text, pauses, and padding where finetuning pads.
        text_tokens: Tokens that are no pauses.
        pauses: raw_tokens - text_tokens.
        seconds: Time of training steps or of answering, without start-up, seconds.
        wall_seconds: Time of the attempts that ended, with start-up, seconds. A killed attempt leaves no record.
        rank_seconds: wall_seconds x ranks.
        cells: Number of cells.
    """

    flops: Number = 0.0
    raw_tokens: int = 0
    text_tokens: int = 0
    pauses: int = 0
    seconds: Number = 0.0
    wall_seconds: Number = 0.0
    rank_seconds: Number = 0.0
    cells: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Work:
    """Raw tokens, text tokens and seconds of a cell."""

    raw_tokens: int
    text_tokens: int
    seconds: float


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """Return the sum of several ledgers."""
    return sum(ledgers, Ledger())


def ledger_of(verb: str, product: Path, flops_per_token: float, wall_seconds: float, ranks: int) -> Ledger:
    """Return the costs of a finished cell.

    Args:
        verb: The verb.
        product: What the verb wrote: a run folder, values of answers, a Hugging Face folder, or results.
        flops_per_token: See `Estimate`.
        wall_seconds: Time of all attempts that ended, seconds.
        ranks: Ranks of the verb.

    Raises:
        DataError: The product is not what the verb writes.
    """
    if verb in ("pretrain", "finetune"):
        work = _training(product / NAME)
    elif verb == "evaluate":
        work = _evaluation(product)
    elif verb == "score":
        read = int(AnswerValues.read(product).metadata["tokens"])
        work = _Work(read, read, wall_seconds)
    else:
        work = _Work(0, 0, wall_seconds)
    raw, text = work.raw_tokens, work.text_tokens
    return Ledger(raw * flops_per_token, raw, text, raw - text, work.seconds, wall_seconds, wall_seconds * ranks, 1)


def _training(path: Path) -> _Work:
    """Return the work of the steps of a run."""
    lines = read_metrics(path).with_numbers("tokens", "text_tokens", "seconds")
    if not lines:
        raise DataError(f"{path}: expected the metrics of a run, got no line of a step with its tokens and seconds")
    # Only the steps that log.every kept have seconds; tokens are running sums.
    seconds = sum(line["seconds"] for line in lines) / len(lines) * lines[-1]["step"]
    return _Work(lines[-1]["tokens"], lines[-1]["text_tokens"], seconds)


def _evaluation(folder: Path) -> _Work:
    """Return the work of all settings; the metrics of a setting share one cost."""
    settings = {
        (entry.task, entry.pauses, entry.location, entry.filler, entry.decoding): entry
        for entry in read_results(folder)
    }
    counts = [entry.tokens for entry in settings.values() if entry.tokens is not None]  # lm-eval counts no tokens
    raw = sum(each.total for each in counts)
    seconds = sum(entry.seconds or 0.0 for entry in settings.values())
    return _Work(raw, raw - sum(each.pauses + each.inside for each in counts), seconds)
