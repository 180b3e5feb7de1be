"""Pre-declaration of an experiment: its runs with their fingerprints in a file, written before they run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pause_megatron.config.text import read_tree, write_yaml
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.grid import CellGraph, Point
from pause_megatron.experiment.schema import Pauses
from pause_megatron.experiment.stored import StoredPoint


class DeclaredRun(BaseModel):
    """A run that is declared.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning.
        seed: Seed of the finetuning.
        cell: Fingerprint of its evaluation, which depends on every setting, the data and the package's version; None
            declares the names only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    variant: str
    task: str
    m_ft: Pauses
    seed: int
    cell: str | None = None

    @property
    def name(self) -> str:
        """The run in words."""
        return f"{self.variant} on {self.task}, M_ft={self.m_ft}, seed {self.seed}"


class Declaration(BaseModel):
    """A file of declared runs.

    Attributes:
        question: What the experiment decides, in words.
        runs: The runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    question: str = ""
    runs: tuple[DeclaredRun, ...]

    def differences(self, points: Iterable[tuple[StoredPoint | Point, str]]) -> list[str]:
        """Return how the runs of an experiment differ from those declared, a sentence each.

        Args:
            points: The points of a plan or of a grid, each with the fingerprint of its evaluation.
        """
        ran = {(p.variant, p.task, p.m_ft, p.seed): fingerprint for p, fingerprint in points}
        declared = {(run.variant, run.task, str(run.m_ft), run.seed): run for run in self.runs}
        found = [f"declared, not in the grid: {run.name}" for key, run in declared.items() if key not in ran]
        found += [
            f"in the grid, not declared: {DeclaredRun(variant=v, task=t, m_ft=m, seed=s).name}"
            for v, t, m, s in ran.keys() - declared.keys()
        ]
        found += [
            f"other settings, data or version than declared: {run.name} ({run.cell} declared, {ran[key]} in the grid)"
            for key, run in declared.items()
            if key in ran and run.cell is not None and run.cell != ran[key]
        ]
        return sorted(found)


def read_declaration(path: Path) -> Declaration:
    """Return the declared runs of a file.

    Raises:
        ConfigError: The file cannot be read, or is no declaration. Names the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"declared: {path} cannot be read: {error}") from None
    tree, locations = read_tree(text, str(path))
    try:
        return Declaration.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        where = tuple(str(part) for part in problem["loc"])
        while where and where not in locations:
            where = where[:-1]
        shown = ".".join(str(part) for part in problem["loc"])
        place = locations.get(where, str(path))
        raise ConfigError(
            f"{place}: {shown}: expected a declared run's field ({problem['msg']}), got {problem['input']!r}"
        ) from None


def declare(graph: CellGraph, question: str) -> str:
    """Return the declaration of all runs of a grid as YAML.

    Args:
        graph: The cells of the grid.
        question: What the experiment decides, in words.
    """
    runs: list[dict[str, Any]] = [
        {"variant": p.variant, "task": p.task, "m_ft": _number(p.m_ft), "seed": p.seed, "cell": p.cell.fingerprint}
        for p in graph.points
    ]
    return write_yaml({"question": question, "runs": runs})


def _number(m_ft: str) -> int | str:
    return int(m_ft) if m_ft.isdecimal() else m_ft
