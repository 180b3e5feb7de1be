"""Ledgers summed over variants, and what was pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pause_megatron.config.load import load
from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import PRODUCT, read_json
from pause_megatron.experiment.estimate import si
from pause_megatron.experiment.ledger import Ledger, total
from pause_megatron.experiment.report.collect import Collected
from pause_megatron.experiment.report.tables import table
from pause_megatron.files.metrics_lines import NAME, read_metrics

TOTAL = "all cells, each once"


def by_variant(collected: Collected) -> dict[str, Ledger]:
    """Costs of all that a variant was made of (pretraining that several share counts in each); then the whole."""
    found = {}
    for variant in collected.grid.variants:
        cells = {
            name: None
            for point in collected.points
            if point["variant"] == variant
            for name in collected.lineage(point["cell"])
        }
        found[variant] = _sum(collected, cells)
    found[TOTAL] = _sum(collected, collected.cells)
    return found


def by_verb(collected: Collected) -> dict[str, Ledger]:
    """Costs by verb."""
    verbs = dict.fromkeys(cell.verb for cell in collected.cells.values())
    return {
        verb: _sum(collected, [name for name, cell in collected.cells.items() if cell.verb == verb]) for verb in verbs
    }


def pretrained(collected: Collected) -> list[dict[str, Any]]:
    """What each finished pretraining run was: parameters, steps, tokens, its last losses in nats."""
    found = []
    for name, cell in collected.cells.items():
        if cell.verb != "pretrain" or cell.ledger is None:
            continue
        run = collected.directory / "cells" / name / PRODUCT["pretrain"]
        config = load(run / "config.yaml")
        last = _last_lines(run / NAME)
        found.append(
            {
                "name": cell.name.removeprefix("pretrain-"),
                "layers": config.model.layers,
                "hidden": config.model.hidden,
                "parameters": read_json(collected.directory / "cells" / name / "cell.json")["parameters"],
                "pause_rate": config.pause.rate,
                "steps": last["step"],
                "raw_tokens": last["tokens"],
                "text_tokens": last["text_tokens"],
                "train_loss": last.get("loss"),
                "valid_loss": last.get("valid_loss"),
                "valid_loss_without_pauses": last.get("valid_loss_without_pauses"),
            }
        )
    return found


def pretrained_table(models: list[dict[str, Any]]) -> str:
    """The same as an HTML table."""
    head = ["model", "layers", "hidden", "parameters", "pause rate", "steps", "raw tokens", "text tokens"]
    head += ["held-out loss", "without pauses"]
    rows = [
        [
            model["name"],
            str(model["layers"]),
            str(model["hidden"]),
            si(model["parameters"]),
            f"{model['pause_rate']:g}",
            f"{model['steps']:,}",
            si(model["raw_tokens"]),
            si(model["text_tokens"]),
            _nats(model["valid_loss"]),
            _nats(model["valid_loss_without_pauses"]),
        ]
        for model in models
    ]
    return table(head, rows, "Losses in nats per text token.") if rows else ""


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sum(collected: Collected, names: Any) -> Ledger:
    return total(ledger for name in names if (ledger := collected.cells[name].ledger) is not None)


def _last_lines(path: Path) -> dict[str, Any]:
    """The last step's record, with the newest held-out losses in it."""
    found: dict[str, Any] = {}
    for record in read_metrics(path).with_numbers("tokens", "text_tokens"):
        found |= {key: value for key, value in record.items() if value is not None}
    if not found:
        raise DataError(f"{path}: expected the metrics of a run, got no line of a step with its tokens")
    return found
