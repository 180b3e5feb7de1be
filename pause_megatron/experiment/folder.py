"""DIR of an experiment: grid.yaml, plan.json (which cells, and what each evaluation stands for), cells/. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import VERSION, Cell, describe, find_folder, read_json, write_json
from pause_megatron.experiment.execute import is_done
from pause_megatron.experiment.grid import Plan
from pause_megatron.experiment.load import dump_grid
from pause_megatron.experiment.schema import Grid
from pause_megatron.files.durable import only_writer, write_whole

State = Literal["done", "running", "queued", "failed", "waiting"]
# Ranks of the verbs that may have several.
TRAINING = ("pretrain", "finetune")


@dataclass(frozen=True)
class Placed:
    """A cell and where it is."""

    cell: Cell
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return is_done(self.folder, self.cell.fingerprint)


def place(directory: Path, plan: Plan) -> dict[str, Placed]:
    """The folder of every cell, by fingerprint, inputs first. Writes nothing."""
    return {cell.fingerprint: Placed(cell, find_folder(directory / "cells", cell)) for cell in plan.cells}


def write_plan(directory: Path, grid: Grid, plan: Plan, ranks: int) -> dict[str, Placed]:
    """Write grid.yaml, plan.json and every cell's cell.json.

    Args:
        ranks: of pretraining and finetuning.

    Returns:
        The folder of every cell, as `place`.
    """
    (directory / "cells").mkdir(parents=True, exist_ok=True)
    placed = place(directory, plan)
    for entry in placed.values():
        entry.folder.mkdir(exist_ok=True)
        if not entry.done:
            source = entry.cell.input
            before = placed[source.fingerprint].folder.name if source else None
            cell_ranks = ranks if entry.cell.verb in TRAINING else 1
            content = describe(entry.cell, before, cell_ranks)
            if read_json(entry.folder / "cell.json", missing_ok=True) != content:
                write_json(entry.folder / "cell.json", content)
    write_whole(directory / "grid.yaml", dump_grid(grid).encode())
    points = [
        {
            "variant": point.variant,
            "task": point.task,
            "m_ft": point.m_ft,
            "seed": point.seed,
            "m_inf": list(point.m_inf),
            "cell": placed[point.cell.fingerprint].folder.name,
        }
        for point in plan.points
    ]
    cells = [entry.folder.name for entry in placed.values()]
    write_json(directory / "plan.json", {"version": VERSION, "cells": cells, "points": points})
    return placed


def read_plan(directory: Path) -> dict[str, Any]:
    """plan.json of an experiment.

    Raises:
        DataError: there is none, or it cannot be used.
    """
    return read_json(directory / "plan.json")


def state_of(folder: Path) -> State:
    """What its folder says of a cell: done, running (a process holds its lock), failed, or waiting.

    Whether a waiting one is queued in SLURM, only SLURM knows.
    """
    cell = read_json(folder / "cell.json")
    if is_done(folder, cell["fingerprint"]):
        return "done"
    try:
        with only_writer(folder / ".lock", folder.name):
            pass
    except DataError:
        return "running"
    return "failed" if (folder / "failed.json").exists() else "waiting"


def counts(states: Iterable[str]) -> str:
    """ "3 done, 1 failed, 5 waiting"."""
    found = Counter(states)
    order = ("done", "running", "queued", "failed", "waiting")
    return ", ".join(f"{found[state]} {state}" for state in order if found[state]) or "none"
