"""Which M_ft (of a control at inference: which M_inf) represents a variant on a task, and on which records."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pause_megatron.evaluate.statistics import mean
from pause_megatron.experiment.report.collect import Collected
from pause_megatron.experiment.report.compare import Key, Summary, summarise

EVALUATION = "evaluation records"
HELD_OUT = "held-out part of train"


@dataclass(frozen=True)
class Choice:
    """The summary that represents a variant on a task, and those that it was chosen from.

    Attributes:
        chosen: The best one. The paper reports the better of M_ft 10 and 50.
        candidates: All of them, the chosen one included.
        records: The records on which it is the best.
        values: Score of each candidate on those records, per cent.
    """

    chosen: Summary
    candidates: tuple[Summary, ...]
    records: str
    values: tuple[float, ...]

    @property
    def biased(self) -> bool:
        """Whether the reported value is biased upwards: the best of several on the very records that are reported."""
        return len(self.candidates) > 1 and self.records == EVALUATION


def choose(collected: Collected, summaries: Mapping[Key, Summary]) -> dict[tuple[str, str], Choice]:
    """Return the choice of every (variant, task) with a score, in the grid's order.

    The held-out part of train decides where all candidates have a score on it from the same seeds.

    Args:
        collected: The experiment.
        summaries: See `summarise`.
    """
    held_out = summarise(collected.held_out)
    found: dict[tuple[str, str], Choice] = {}
    for variant in collected.grid.variants:
        for task in collected.grid.tasks:
            own = [key for key, each in summaries.items() if key[:2] == (variant, task) and each.own]
            if own:
                found[variant, task] = _choice(own, summaries, held_out)
    return found


def _choice(own: Sequence[Key], summaries: Mapping[Key, Summary], held_out: Mapping[Key, Summary]) -> Choice:
    on_held_out = (
        all(key in held_out for key in own) and len({tuple(sorted(held_out[key].by_seed)) for key in own}) == 1
    )
    deciding = held_out if on_held_out else summaries
    shared = set.intersection(*({*deciding[key].by_seed} for key in own))  # an experiment may be incomplete
    values = {key: _value(deciding[key], shared) for key in own}
    best = max(own, key=values.__getitem__)
    return Choice(
        summaries[best],
        tuple(summaries[key] for key in own),
        HELD_OUT if on_held_out else EVALUATION,
        tuple(values.values()),
    )


def _value(summary: Summary, seeds: Collection[int]) -> float:
    """Return the mean over the given seeds; over all if there are none."""
    return mean([summary.by_seed[seed] for seed in seeds]).value if seeds else summary.value
