"""Reads what the cells of an experiment left: scores record by record, and ledgers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.evaluate.journal import read_samples
from pause_megatron.evaluate.results import read_results
from pause_megatron.experiment.cell import PRODUCT, read_json
from pause_megatron.experiment.execute import is_done
from pause_megatron.experiment.folder import read_plan
from pause_megatron.experiment.ledger import Ledger
from pause_megatron.experiment.load import load_grid
from pause_megatron.experiment.schema import Grid


@dataclass(frozen=True)
class Score:
    """One model on one task with one number of pauses.

    Attributes:
        variant, task: names of the grid.
        m_ft, m_inf: pauses in finetuning (as the grid wrote them) and at inference.
        seed: of the finetuning.
        own: whether the variant stands for this M_inf, or a curve asked for it.
        metric: the task's primary one.
        value: mean, 0..1. standard_error: over records.
        n: records.
        records: score of each, by its id; empty where the harness kept none.
        cell: folder of the evaluation.
    """

    variant: str
    task: str
    m_ft: str
    m_inf: int
    seed: int
    own: bool
    metric: str
    value: float
    standard_error: float | None
    n: int
    records: Mapping[str, float]
    cell: str


@dataclass(frozen=True)
class CellFacts:
    """A cell of the plan.

    Attributes:
        input: folder name of the cell that it begins from. ledger: None while it is not done.
    """

    name: str
    verb: str
    input: str | None
    ledger: Ledger | None


@dataclass(frozen=True)
class Collected:
    """Everything that a report is made of.

    Attributes:
        points: of plan.json: variant, task, m_ft, seed, m_inf, cell.
        cells: by folder name, in the order of the plan.
    """

    directory: Path
    grid: Grid
    points: tuple[Mapping[str, Any], ...]
    cells: Mapping[str, CellFacts]
    scores: tuple[Score, ...]

    @property
    def done(self) -> int:
        """Cells that are complete."""
        return sum(cell.ledger is not None for cell in self.cells.values())

    def lineage(self, cell: str) -> Iterator[str]:
        """A cell and all that it was made from."""
        current: str | None = cell
        while current is not None:
            yield current
            current = self.cells[current].input


def collect(directory: Path) -> Collected:
    """Read an experiment, complete or not.

    Raises:
        DataError: no experiment there, or a file of it that cannot be used.
    """
    plan = read_plan(directory)
    grid = load_grid(directory / "grid.yaml")
    cells = {name: _facts(directory / "cells" / name) for name in plan["cells"]}
    scores = [
        score
        for point in plan["points"]
        if cells[point["cell"]].ledger is not None
        for score in _scores(directory / "cells" / point["cell"], point)
    ]
    return Collected(directory, grid, tuple(plan["points"]), cells, tuple(scores))


def _facts(folder: Path) -> CellFacts:
    cell = read_json(folder / "cell.json")
    ledger = None
    if is_done(folder, cell["fingerprint"]):
        ledger = Ledger(**read_json(folder / "done.json")["ledger"])
    return CellFacts(cell["name"], cell["verb"], cell["input"], ledger)


def _scores(folder: Path, point: Mapping[str, Any]) -> Iterator[Score]:
    """One score for every number of pauses of an evaluation."""
    results = folder / PRODUCT["evaluate"]
    entries = [entry for entry in read_results(results) if entry.primary]
    if not entries:
        raise DataError(f"{results / 'results.json'}: expected an entry of a primary metric, got none")
    for entry in entries:
        path = results / "samples" / f"{entry.settings.name(entry.task)}.jsonl"
        samples = read_samples(path) if path.exists() else {}
        yield Score(
            variant=point["variant"],
            task=point["task"],
            m_ft=point["m_ft"],
            m_inf=entry.pauses,
            seed=point["seed"],
            own=entry.pauses in point["m_inf"],
            metric=entry.metric,
            value=entry.value,
            standard_error=entry.standard_error,
            n=entry.n,
            records={name: sample.scores[entry.metric] for name, sample in samples.items()},
            cell=folder.name,
        )
