"""Reading the outputs of an experiment's cells: scores record by record, and ledgers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.evaluate.identity import HARNESS
from pause_megatron.evaluate.journal import read_samples
from pause_megatron.evaluate.results import read_results
from pause_megatron.evaluate.statistics import interval, wilson
from pause_megatron.experiment.cell import PRODUCT
from pause_megatron.experiment.ledger import Ledger
from pause_megatron.experiment.load import load_grid
from pause_megatron.experiment.provenance import Origin, OriginFile
from pause_megatron.experiment.schema import Grid
from pause_megatron.experiment.stored import CellFile, DoneFile, PlanFile, StoredPoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The score of one model on one task with one number of pauses.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning, as the grid has them.
        m_inf: Pauses at inference.
        seed: Seed of the finetuning.
        own: Whether this M_inf is the variant's own; otherwise a curve requested it.
        metric: The task's primary metric.
        value: Mean over records, 0..1.
        standard_error: Standard error over records, clustered by group; None for one record.
        n: Number of records.
        records: Score of each record by its id; empty if the harness kept none.
        cell: Folder name of the evaluation.
        groups: Group of each record that has one (records that share a text), by its id.
        samples: Name of the samples file in the cell's results.
        model: Fingerprint of the model.
        data: Fingerprint of the records.
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
    groups: Mapping[str, str] = field(default_factory=dict)
    samples: str = ""
    model: str = ""
    data: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval over records, 0..1."""
        if self.records:
            return interval(list(self.records.values()), [self.groups.get(name, "") for name in self.records])
        return wilson(self.value * self.n, self.n)

    @property
    def group_count(self) -> int:
        """Number of groups; a record without one is its own."""
        return len(set(self.groups.values())) + self.n - len(self.groups)


@dataclass(frozen=True)
class CellFacts:
    """A cell of an experiment.

    Attributes:
        name: Name of the cell.
        verb: The verb.
        inputs: Folder names of the cells whose products it reads.
        parameters: Number of parameters of the model, of pretraining cells.
        ledger: Costs; None until it is complete.
        fingerprint: See `Cell.fingerprint`.
        identity: See `Cell.identity`.
        origin: Program and machine of its last attempt; None if an earlier version ran it.
    """

    name: str
    verb: str
    inputs: tuple[str, ...]
    parameters: int
    ledger: Ledger | None
    fingerprint: str
    identity: Mapping[str, Any]
    origin: Origin | None


@dataclass(frozen=True)
class Collected:
    """The data of a report.

    Attributes:
        directory: Folder of the experiment.
        grid: The grid.
        points: The points of plan.json.
        cells: Cells by folder name, in the order of plan.json.
        scores: Scores of the complete evaluations.
        held_out: Scores on the held-out part of train, on which M_ft and M_inf are chosen.
    """

    directory: Path
    grid: Grid
    points: tuple[StoredPoint, ...]
    cells: Mapping[str, CellFacts]
    scores: tuple[Score, ...]
    held_out: tuple[Score, ...] = ()

    @property
    def done(self) -> int:
        """Number of complete cells."""
        return sum(cell.ledger is not None for cell in self.cells.values())

    def lineage(self, cell: str) -> Iterator[str]:
        """Yield a cell and all cells that it depends on, by folder name, each once."""
        found = [cell]
        for name in found:
            yield name
            found += [each for each in self.cells[name].inputs if each not in found]


def collect(directory: Path) -> Collected:
    """Read an experiment, complete or not.

    Raises:
        DataError: The folder holds no experiment, or a file cannot be used.
    """
    plan = PlanFile.read(directory)
    grid = load_grid(directory / "grid.yaml")
    cells = {name: _facts(directory / "cells" / name) for name in plan.cells}
    complete = {name for name, cell in cells.items() if cell.ledger is not None}
    scores, held_out = (
        tuple(
            score for point, name in pairs if name in complete for score in _scores(directory / "cells" / name, point)
        )
        for pairs in (
            [(point, point.cell) for point in plan.points],
            [(point, point.held_out) for point in plan.points],
        )
    )
    return Collected(directory, grid, plan.points, cells, scores, held_out)


def _facts(folder: Path) -> CellFacts:
    cell, done = CellFile.read(folder), DoneFile.read_if_present(folder)
    ledger = done.ledger if done is not None and done.fingerprint == cell.fingerprint else None
    found = OriginFile.read_if_present(folder)
    origin = None if found is None else found.origin
    inputs = tuple(name for name in (cell.input, cell.scores) if name)
    return CellFacts(cell.name, cell.verb, inputs, cell.parameters, ledger, cell.fingerprint, cell.identity, origin)


def _scores(folder: Path, point: StoredPoint) -> Iterator[Score]:
    """Yield a score for every number of pauses of an evaluation."""
    results = folder / PRODUCT["evaluate"]
    entries = [entry for entry in read_results(results) if entry.primary]
    if not entries:
        raise DataError(f"{results / 'results.json'}: expected an entry of a primary metric, got none")
    for entry in entries:
        path = results / "samples" / f"{entry.settings.name(entry.task)}.jsonl"
        samples = read_samples(path) if path.exists() else {}
        if samples and len(samples) != entry.n:
            raise DataError(
                f"{path}: expected {entry.n} records, as in results.json, got {len(samples)}; remove "
                f"{folder / 'done.json'} and run the experiment again"
            )
        if not samples and entry.harness == HARNESS:
            log.warning("%s: expected %d records, got no file; comparisons with it are left out", path, entry.n)
        groups = {name: sample.group for name, sample in samples.items() if sample.group}
        yield Score(
            variant=point.variant,
            task=point.task,
            m_ft=point.m_ft,
            m_inf=entry.pauses,
            seed=point.seed,
            own=entry.pauses in point.m_inf,
            metric=entry.metric,
            value=entry.value,
            standard_error=entry.standard_error,
            n=entry.n,
            records={name: sample.scores[entry.metric] for name, sample in samples.items()},
            cell=folder.name,
            groups=groups,
            samples=path.name if samples else "",
            model=entry.model,
            data=entry.data,
        )
