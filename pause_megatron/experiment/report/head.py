"""The head of a report: when, by which program, on which machine and from which files its numbers are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

from pause_megatron.config.pauses import PLACEMENTS
from pause_megatron.experiment.declared import read_declaration
from pause_megatron.experiment.provenance import DECLARED, Start, StartsFile, origin, sha256
from pause_megatron.experiment.report.collect import CellFacts, Collected
from pause_megatron.experiment.report.page import Cell, Row, breakable, bullets, definitions, table

_OBJECTIVE = ("name", "discount", "stop_rate", "step_cost", "z_loss", "token_weights")
_SETTINGS = (
    *("optim.lr", "optim.warmup_steps", "train.steps", "batch.global_size", "data.sequence_length", "engine.precision"),
    *("task.limit", "task.held_out", "finetune.location", "finetune.filler", "finetune.prefix_attention"),
    *("pause.rate", "pause.embeddings", "model.layers", "model.hidden", "model.loops", "model.loop_layers"),
    *("pause.placement", "pause.run", "pause.pattern", "pause.positions", "data.side"),
    *("finetune.answer_placement", "finetune.answer_rate", *(f"objective.{name}" for name in _OBJECTIVE)),
)


def provenance(collected: Collected) -> dict[str, Any]:
    """Return the facts of the head as plain JSON, the key "provenance" of summary.json."""
    directory = collected.directory
    starts = (StartsFile.read_if_present(directory) or StartsFile()).starts
    origins = Counter(
        json.dumps(cell.origin.model_dump()) for cell in collected.cells.values() if cell.origin is not None
    )
    return {
        "written": _time(datetime.now(timezone.utc).timestamp()),
        "report": origin().model_dump(),
        "directory": str(directory),
        "grid_sha256": sha256(directory / "grid.yaml"),
        "starts": [{**start.model_dump(), "begun": _time(start.begun)} for start in starts],
        "cells": [{"cells": count, **json.loads(text)} for text, count in origins.most_common()],
        "corpora": {
            cell.name: cell.identity.get("corpus") for cell in collected.cells.values() if cell.verb == "pretrain"
        },
        "records": {score.task: score.data for score in collected.scores},
        "declared": _declared(collected, starts),
    }


def head(facts: Mapping[str, Any]) -> str:
    """Return the facts as HTML.

    Args:
        facts: See `provenance`.
    """
    return definitions(_lines(facts))


def settings_table(collected: Collected) -> str:
    """Return the settings of every training, those of equal settings in one row; "" if none is known."""
    lines = {point.cell: set(collected.lineage(point.cell)) for point in collected.points}
    found: dict[tuple[str, ...], list[CellFacts]] = {}
    variants: dict[tuple[str, ...], dict[str, None]] = {}
    for folder, cell in collected.cells.items():
        config = cell.identity.get("config")
        if cell.verb in ("pretrain", "finetune") and isinstance(config, Mapping):
            values = ["" if config.get(key) is None else str(config[key]) for key in _SETTINGS]
            if config.get("pause.placement") == PLACEMENTS[0]:  # other keys of methods are absent at their default
                values[_SETTINGS.index("pause.placement")] = ""
            name = cell.name.rpartition("-s")[0] if cell.verb == "finetune" else cell.name
            found.setdefault((name, *values), []).append(cell)
            users = (point.variant for point in collected.points if folder in lines[point.cell])
            variants.setdefault((name, *values), {}).update(dict.fromkeys(users))
    shown = [index for index, _ in enumerate(_SETTINGS) if any(key[index + 1] for key in found)]
    rows: list[Row] = [
        [
            breakable(key[0]),
            "<br>".join(map(breakable, variants[key])),
            str(len(cells)),
            *(escape(key[index + 1]) for index in shown),
        ]
        for key, cells in found.items()
    ]
    names = [_SETTINGS[index] for index in shown]
    caption = "Keys of each run's config.yaml; all of them are in DIR/cells/NAME/run/config.yaml."
    return table(["run", "variants", "seeds", *names], rows, caption) if rows else ""


def cells_table(collected: Collected, where: Callable[[str], str]) -> str:
    """Return every cell with its fingerprint, a link to its folder and its state.

    Args:
        collected: The experiment.
        where: Relative path of a cell's folder by its name.
    """
    models = {score.cell: score.model for score in collected.scores}
    rows: list[Row] = [
        [
            f'<a href="{escape(where(name), quote=True)}">{breakable(cell.name)}</a>',
            cell.verb,
            f"<code>{cell.fingerprint}</code>",
            f"<code>{escape(models.get(name, ''))}</code>",
            "not done" if cell.ledger is None else "done",
            "" if cell.ledger is None else Cell(f"{cell.ledger.wall_seconds:,.0f}", float(cell.ledger.wall_seconds)),
        ]
        for name, cell in collected.cells.items()
    ]
    return table(["cell", "verb", "fingerprint", "model", "state", "wall seconds"], rows)


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "report written", f"{facts['written']} by {_program(facts['report'])}"
    for start in facts["starts"]:
        command = escape(" ".join(["pause-megatron", *start["command"]]))
        digest = f"{escape(start['grid'])}, SHA-256 <code>{start['grid_sha256']}</code>"
        yield f"run {start['begun']}", f"<code>{command}</code><br>grid: {digest}"
    if not facts["starts"]:
        yield "run", "command not recorded (an earlier version ran it)"
    yield (
        "grid as run",
        f"DIR/grid.yaml, SHA-256 <code>{facts['grid_sha256']}</code>; DIR: {escape(facts['directory'])}",
    )
    yield "declared before", _declaration(facts["declared"])
    for each in facts["cells"]:
        count = f"{each['cells']} cell{'s' if each['cells'] > 1 else ''}"
        yield f"{count} on", f"{escape(each['machine'])}, {escape(each['system'])}: {_program(each)}"
    if not facts["cells"]:
        yield "machine", "not recorded (an earlier version ran the cells)"
    for corpus in dict.fromkeys(facts["corpora"].values()):
        names = (name.removeprefix("pretrain-") for name, other in facts["corpora"].items() if other == corpus)
        yield f"corpus of {', '.join(names)}", f"<code>{escape(str(corpus))}</code>"
    for task, digest in facts["records"].items():
        yield f"records of {task}", f"<code>{escape(digest)}</code>"


def _program(facts: Mapping[str, Any]) -> str:
    """Return versions in words."""
    commit = f", commit <code>{escape(facts['commit'])}</code>" if facts["commit"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    return f"pause-megatron {escape(facts['package'])}{commit}, Python {escape(facts['python'])}, {escape(packages)}"


def _declared(collected: Collected, starts: Sequence[Start]) -> dict[str, Any] | None:
    path = collected.directory / DECLARED
    if not path.exists():
        return None
    declaration = read_declaration(path)
    points = [(point, collected.cells[point.cell].fingerprint) for point in collected.points]
    return {
        "sha256": sha256(path),
        "question": declaration.question,
        "runs": len(declaration.runs),
        "with_fingerprints": sum(run.cell is not None for run in declaration.runs),
        "differences": declaration.differences(points),
        "at_first_start": bool(starts) and starts[0].declared_sha256 == sha256(path),
    }


def _declaration(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "nothing: the runs were chosen freely"
    text = (
        f"SHA-256 <code>{facts['sha256']}</code>, {facts['runs']} runs, {facts['with_fingerprints']} with fingerprints"
    )
    question = f" Question: {escape(facts['question'])}" if facts["question"] else ""
    if not facts["at_first_start"]:
        text += "; <b>not there at the first start of the experiment</b>"
    if not facts["differences"]:
        return f"{text}; the grid's runs are those declared.{question}"
    return f"{text}; <b>the grid's runs differ:</b>{question}{bullets(facts['differences'])}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
