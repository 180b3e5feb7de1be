"""What a cell cost: model FLOPs, tokens, pauses, time. Read off what the verb left behind. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.files.metrics_lines import NAME, read_metrics


@dataclass(frozen=True)
class Ledger:
    """Costs of a cell, or of several together.

    Attributes:
        flops: model FLOPs by the convention of `config.presets.flops_per_token`; evaluation counts forward passes only.
        raw_tokens: that went through the model: text, pauses, and the padding of finetuning where it pads.
        text_tokens: those that were no pauses.
        pauses: raw_tokens - text_tokens.
        seconds: of training steps, or of answering; without start-up.
        wall_seconds: of the attempts that ended, start-up included; an attempt that was killed left no record.
        rank_seconds: wall_seconds x ranks.
        cells: how many.
    """

    flops: float = 0.0
    raw_tokens: int = 0
    text_tokens: int = 0
    pauses: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    rank_seconds: float = 0.0
    cells: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def as_json(self) -> dict[str, Any]:
        """For done.json and summary.json."""
        return asdict(self)


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """Sum of several."""
    return sum(ledgers, Ledger())


def ledger_of(verb: str, product: Path, flops_per_token: float, wall_seconds: float, ranks: int) -> Ledger:
    """The costs of a finished cell.

    Args:
        product: what the verb wrote: a run folder, a Hugging Face folder, results.
        flops_per_token: see `Estimate`.

    Raises:
        DataError: the product is not what the verb writes.
    """
    if verb in ("pretrain", "finetune"):
        raw, text, seconds = _training(product / NAME)
    elif verb == "evaluate":
        raw, text, seconds = _evaluation(product / "results.json")
    else:
        raw, text, seconds = 0, 0, wall_seconds
    return Ledger(raw * flops_per_token, raw, text, raw - text, seconds, wall_seconds, wall_seconds * ranks, 1)


def _training(path: Path) -> tuple[int, int, float]:
    """Raw tokens, text tokens and seconds of the steps of a run."""
    lines = read_metrics(path).with_numbers("tokens", "text_tokens", "seconds")
    if not lines:
        raise DataError(f"{path}: expected the metrics of a run, got no line of a step with its tokens and seconds")
    # Seconds stand only in the lines that log.every kept; tokens are running sums.
    seconds = sum(line["seconds"] for line in lines) / len(lines) * lines[-1]["step"]
    return lines[-1]["tokens"], lines[-1]["text_tokens"], seconds


def _evaluation(path: Path) -> tuple[int, int, float]:
    """Raw tokens, text tokens and seconds of all settings; each has several metrics, which share one cost."""
    try:
        entries = json.loads(path.read_bytes())["results"]
        settings = {(entry["task"], entry["pauses"], entry["location"], entry["filler"]): entry for entry in entries}
        # A harness that counts no tokens (lm-eval) has none to give.
        tokens = [entry.get("tokens") or {"prompt": 0, "pauses": 0, "new": 0} for entry in settings.values()]
        seconds = sum(entry.get("seconds") or 0.0 for entry in settings.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the results of an evaluation: {error!r}") from None
    raw = sum(sum(entry.values()) for entry in tokens)
    return raw, raw - sum(entry["pauses"] for entry in tokens), seconds
