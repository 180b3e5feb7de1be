"""The combinations of a grid: a variant, a task, pauses in finetuning and a seed, and their pauses at inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pause_megatron.config.finetune_schema import TaskSection
from pause_megatron.experiment.schema import Grid, Keys, Pauses, highest


class Combination(NamedTuple):
    """One finetuning of a grid and its evaluation.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning.
        seed: Seed of the finetuning.
    """

    variant: str
    task: str
    m_ft: Pauses
    seed: int

    def keys(self, grid: Grid) -> Keys:
        """Return the keys that the grid sets for the finetuning; those of the variant count before the task's."""
        return {**grid.finetune.set, **grid.tasks[self.task].set, **grid.variants[self.variant].set}

    def own_pauses(self, grid: Grid) -> tuple[int, ...]:
        """Return the M_inf of the variant."""
        return grid.variants[self.variant].inference.pauses or (highest(self.m_ft),)

    def all_pauses(self, grid: Grid) -> tuple[int, ...]:
        """Return every M_inf: the variant's own, and those of its curves."""
        pauses = set(self.own_pauses(grid))
        for curve in grid.curves:
            of_task = curve.tasks is None or self.task in curve.tasks
            of_m_ft = curve.m_ft is None or str(self.m_ft) in map(str, curve.m_ft)
            if self.variant in curve.variants and of_task and of_m_ft:
                pauses |= set(curve.pauses)
        return tuple(sorted(pauses))

    def held_out(self, grid: Grid) -> float | None:
        """Return the held-out fraction of train where there are several M_ft or M_inf to choose from; else None."""
        if grid.evaluate.select != "held_out":
            return None
        if len(_m_ft(grid, self.variant, self.task)) == 1 and len(self.own_pauses(grid)) == 1:
            return None
        found = self.keys(grid).get("task.held_out", TaskSection.model_fields["held_out"].default)
        return found if isinstance(found, float) and found else None


def combinations(grid: Grid) -> Iterator[Combination]:
    """Yield every combination, seeds outermost, so that an experiment that is stopped early has whole seeds."""
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            for task in variant.tasks or grid.tasks:
                for m_ft in _m_ft(grid, name, task):
                    yield Combination(name, task, m_ft, seed)


def _m_ft(grid: Grid, name: str, task: str) -> tuple[Pauses, ...]:
    variant = grid.variants[name]
    return (0,) if variant.finetune == "standard" else variant.pauses or grid.tasks[task].pauses
