"""The folder of an experiment: grid.yaml, plan.json and cells/, and the state of each cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import Cell
from pause_megatron.experiment.grid import CellGraph
from pause_megatron.experiment.load import dump_grid
from pause_megatron.experiment.schema import Grid
from pause_megatron.experiment.stored import CellFile, FailedFile, PlanFile, StoredPoint, is_done
from pause_megatron.files.durable import only_writer, write_whole

State = Literal["done", "running", "queued", "failed", "waiting"]
STATES: tuple[State, ...] = ("done", "running", "queued", "failed", "waiting")
TRAINING = ("pretrain", "finetune")
"""The verbs that run on several ranks."""


@dataclass(frozen=True)
class LocatedCell:
    """A cell and its folder.

    Attributes:
        cell: The cell.
        folder: Its folder.
    """

    cell: Cell
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return is_done(self.folder, self.cell.fingerprint)


def find_folder(cells: Path, cell: Cell) -> Path:
    """Return the folder of a cell: an existing one of its fingerprint under any name, or else a new one.

    Args:
        cells: DIR/cells.
        cell: The cell.
    """
    for folder in sorted(cells.glob(f"*-{cell.fingerprint[:8]}")):
        found = CellFile.read_if_present(folder)
        if found is not None and found.fingerprint == cell.fingerprint:
            return folder
    return cells / cell.folder_name


def locate_cells(directory: Path, graph: CellGraph) -> dict[str, LocatedCell]:
    """Return every cell with its folder by fingerprint, inputs first. Writes nothing.

    Args:
        directory: Folder of the experiment.
        graph: The cells.
    """
    return {cell.fingerprint: LocatedCell(cell, find_folder(directory / "cells", cell)) for cell in graph.cells}


def write_plan(directory: Path, grid: Grid, graph: CellGraph, ranks: int) -> dict[str, LocatedCell]:
    """Write grid.yaml, plan.json and every cell's cell.json.

    Args:
        directory: Folder of the experiment.
        grid: The grid.
        graph: Its cells.
        ranks: Ranks of pretraining and finetuning.

    Returns:
        Every cell with its folder, as `locate_cells`.
    """
    (directory / "cells").mkdir(parents=True, exist_ok=True)
    located = locate_cells(directory, graph)

    def folder_of(cell: Cell) -> str:
        return located[cell.fingerprint].folder.name

    for entry in located.values():
        entry.folder.mkdir(exist_ok=True)
        if not entry.done:
            content = CellFile.of(entry.cell, folder_of, ranks if entry.cell.verb in TRAINING else 1)
            if CellFile.read_if_present(entry.folder) != content:
                content.write(entry.folder)
    write_whole(directory / "grid.yaml", dump_grid(grid).encode())
    points = tuple(
        StoredPoint(
            variant=point.variant,
            task=point.task,
            m_ft=point.m_ft,
            seed=point.seed,
            m_inf=point.m_inf,
            cell=folder_of(point.cell),
            held_out=folder_of(point.held_out) if point.held_out else None,
        )
        for point in graph.points
    )
    PlanFile(cells=tuple(entry.folder.name for entry in located.values()), points=points).write(directory)
    return located


def state_of(folder: Path) -> State:
    """Return the state of a cell by its folder: done, running (its lock is held), failed, or waiting.

    Whether a waiting cell is queued in SLURM, only SLURM can answer.
    """
    cell = CellFile.read(folder)
    if is_done(folder, cell.fingerprint):
        return "done"
    try:
        with only_writer(folder / ".lock", folder.name):
            pass
    except DataError:
        return "running"
    return "failed" if (folder / FailedFile.NAME).exists() else "waiting"


def counts(states: Iterable[str]) -> str:
    """Return the number of cells in each state, for example "3 done, 1 failed, 5 waiting"."""
    found = Counter(states)
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state]) or "none"
