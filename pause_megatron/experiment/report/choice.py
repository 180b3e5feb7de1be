"""Which M_ft (of a control at inference: which M_inf) represents a variant on a task, and on which records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pause_megatron.experiment.report.collect import Collected
from pause_megatron.experiment.report.compare import Key, Summary

EVALUATION = "evaluation records"


@dataclass(frozen=True)
class Choice:
    """The summary that represents a variant on a task, and those that it was chosen from.

    Attributes:
        chosen: The best one. The paper reports the better of M_ft 10 and 50.
        candidates: All of them, the chosen one included.
        records: The records on which it is the best.
    """

    chosen: Summary
    candidates: tuple[Summary, ...]
    records: str = EVALUATION

    @property
    def biased(self) -> bool:
        """Whether the reported value is biased upwards: the best of several on the very records that are reported."""
        return len(self.candidates) > 1 and self.records == EVALUATION


def choose(collected: Collected, summaries: Mapping[Key, Summary]) -> dict[tuple[str, str], Choice]:
    """Return the choice of every (variant, task) with a score, in the grid's order.

    Args:
        collected: The experiment.
        summaries: See `summarise`.
    """
    found: dict[tuple[str, str], Choice] = {}
    for variant in collected.grid.variants:
        for task in collected.grid.tasks:
            own = tuple(
                each for each in summaries.values() if (each.variant, each.task) == (variant, task) and each.own
            )
            if own:
                found[variant, task] = Choice(max(own, key=lambda each: each.value), own)
    return found
