"""Costs by variant and by verb, and the pretrained models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.config.batching import pause_counts
from pause_megatron.config.load import load_saved
from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import PRODUCT
from pause_megatron.experiment.estimate import si
from pause_megatron.experiment.ledger import Ledger, total
from pause_megatron.experiment.report.collect import Collected
from pause_megatron.experiment.report.page import Row, table
from pause_megatron.files.metrics_lines import NAME, read_metrics

TOTAL = "all cells, each once"


@dataclass(frozen=True)
class PretrainedModel:
    """A finished pretraining run; the fields are those of summary.json.

    Attributes:
        name: Name of the model in the grid.
        layers: Number of layers.
        hidden: Hidden size.
        parameters: Number of parameters.
        pause_rate: `pause.rate` of the run; with `every`, what its runs make of it.
        steps: Optimizer steps.
        raw_tokens: Text and pause tokens.
        text_tokens: Text tokens.
        train_loss: Last training loss, nats; None if it was not finite.
        valid_loss: Newest validation loss, nats; None without validation.
        valid_loss_without_pauses: The same on windows without pauses.
    """

    name: str
    layers: int
    hidden: int
    parameters: int
    pause_rate: float
    steps: int
    raw_tokens: int
    text_tokens: int
    train_loss: float | None
    valid_loss: float | None
    valid_loss_without_pauses: float | None


def by_variant(collected: Collected) -> dict[str, Ledger]:
    """Return the costs of each variant and the total. Shared pretraining counts in every variant that uses it."""
    costs = {}
    for variant in collected.grid.variants:
        cells = dict.fromkeys(
            name for point in collected.points if point.variant == variant for name in collected.lineage(point.cell)
        )
        costs[variant] = _sum(collected, cells)
    costs[TOTAL] = _sum(collected, collected.cells)
    return costs


def by_verb(collected: Collected) -> dict[str, Ledger]:
    """Return the costs of each verb."""
    verbs = dict.fromkeys(cell.verb for cell in collected.cells.values())
    return {
        verb: _sum(collected, [name for name, cell in collected.cells.items() if cell.verb == verb]) for verb in verbs
    }


def pretrained(collected: Collected) -> list[PretrainedModel]:
    """Return every finished pretraining run."""
    models = []
    for name, cell in collected.cells.items():
        if cell.verb != "pretrain" or cell.ledger is None:
            continue
        run = collected.directory / "cells" / name / PRODUCT["pretrain"]
        config = load_saved(run / "config.yaml")
        last = newest_metrics(run / NAME)
        models.append(
            PretrainedModel(
                name=cell.name.removeprefix("pretrain-"),
                layers=config.model.layers,
                hidden=config.model.hidden,
                parameters=cell.parameters,
                pause_rate=pause_counts(config).nominal_rate,
                steps=last["step"],
                raw_tokens=last["tokens"],
                text_tokens=last["text_tokens"],
                train_loss=last.get("loss"),
                valid_loss=last.get("valid_loss"),
                valid_loss_without_pauses=last.get("valid_loss_without_pauses"),
            )
        )
    return models


def pretrained_table(models: Sequence[PretrainedModel]) -> str:
    """Return the models as an HTML table; "" without models."""
    head = ["model", "layers", "hidden", "parameters", "pause rate", "steps", "raw tokens", "text tokens"]
    head += ["held-out loss", "without pauses"]
    rows: list[Row] = [
        [
            model.name,
            str(model.layers),
            str(model.hidden),
            si(model.parameters),
            f"{model.pause_rate:g}",
            f"{model.steps:,}",
            si(model.raw_tokens),
            si(model.text_tokens),
            _nats(model.valid_loss),
            _nats(model.valid_loss_without_pauses),
        ]
        for model in models
    ]
    return table(head, rows, "Losses in nats per text token.") if rows else ""


def newest_metrics(path: Path) -> dict[str, Any]:
    """Return the last step's metrics, with the newest value of each metric that it lacks.

    Raises:
        DataError: The file holds no line of a step with its tokens.
    """
    found: dict[str, Any] = {}
    for line in read_metrics(path).with_numbers("tokens", "text_tokens"):
        found |= {key: value for key, value in line.items() if value is not None}
    if not found:
        raise DataError(f"{path}: expected the metrics of a run, got no line of a step with its tokens")
    return found


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sum(collected: Collected, names: Iterable[str]) -> Ledger:
    return total(ledger for name in names if (ledger := collected.cells[name].ledger) is not None)
