"""Scores over seeds, and comparisons of variants with the baseline, with their intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pause_megatron.evaluate.statistics import Difference, mean, paired_bootstrap
from pause_megatron.experiment.report.collect import Collected, Score

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T95_BEYOND = 2.13

Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Summary:
    """A variant on a task with one M_ft and one M_inf, over seeds, in per cent.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning, as the grid has them.
        m_inf: Pauses at inference.
        metric: The task's primary metric.
        value: Mean over seeds, per cent.
        over_seeds: Standard error of that mean; None with one seed.
        over_records: Standard error over records of one seed's value, averaged over seeds; None if unknown.
        seeds: Number of seeds.
        n: Number of records of each seed.
        own: See `Score`.
        records: Score of each record averaged over seeds, 0..1.
        by_seed: Value of each seed, per cent.
    """

    variant: str
    task: str
    m_ft: str
    m_inf: int
    metric: str
    value: float
    over_seeds: float | None
    over_records: float | None
    seeds: int
    n: int
    own: bool
    records: Mapping[str, float]
    by_seed: Mapping[int, float]

    @property
    def error(self) -> float | None:
        """Length of error bars: the standard error over seeds, or over records with one seed."""
        return self.over_records if self.over_seeds is None else self.over_seeds


@dataclass(frozen=True)
class Comparison:
    """The difference of a variant from the baseline on the same records, in per cent.

    Attributes:
        difference: Mean over records and seeds.
        low: Lower end of the 95 % interval of the paired bootstrap over records.
        high: Upper end of that interval.
        seed_low: Lower end of the 95 % interval over seeds (paired by seed, Student's t); None with one seed.
        seed_high: Upper end of that interval; None with one seed.
    """

    difference: float
    low: float
    high: float
    seed_low: float | None
    seed_high: float | None

    @property
    def supported(self) -> bool:
        """Whether both intervals exclude 0, so that neither records nor seeds explain the difference."""
        if self.seed_low is None or self.seed_high is None:
            return False
        return (self.low > 0 or self.high < 0) and (self.seed_low > 0 or self.seed_high < 0)


def summarise(scores: Iterable[Score]) -> dict[Key, Summary]:
    """Return scores over their seeds by (variant, task, M_ft, M_inf)."""
    groups: dict[Key, list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.variant, score.task, score.m_ft, score.m_inf].append(score)
    return {key: _summary(key, group) for key, group in groups.items()}


def main_summaries(collected: Collected, summaries: Mapping[Key, Summary]) -> dict[tuple[str, str], Summary]:
    """Return the summary that represents a variant on a task, by (variant, task).

    Of several M_ft (or, for a control at inference, several M_inf) it is the best one: the paper reports the better of
    10 and 50. It is selected on the reported records, which biases it upwards.

    Args:
        collected: The experiment.
        summaries: See `summarise`.
    """
    found: dict[tuple[str, str], Summary] = {}
    for summary in summaries.values():
        key = summary.variant, summary.task
        if summary.own and (key not in found or summary.value > found[key].value):
            found[key] = summary
    return {
        (variant, task): found[variant, task]
        for variant in collected.grid.variants
        for task in collected.grid.tasks
        if (variant, task) in found
    }


def compare(one: Summary, baseline: Summary) -> Comparison | None:
    """Return the comparison of a variant with the baseline; None if their records differ.

    Args:
        one: The variant.
        baseline: The baseline on the same task.
    """
    if not one.records or one.records.keys() != baseline.records.keys():
        return None
    over_records: Difference = paired_bootstrap(one.records, baseline.records)
    seeds = sorted(one.by_seed.keys() & baseline.by_seed.keys())
    differences = [one.by_seed[seed] - baseline.by_seed[seed] for seed in seeds]
    low, high = t_interval(differences)
    return Comparison(100 * over_records.value, 100 * over_records.low, 100 * over_records.high, low, high)


def t_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of a mean by Student's t; (None, None) for fewer than two values."""
    found = mean(values) if values else None
    if found is None or found.standard_error is None:
        return None, None
    freedom = len(values) - 1
    half = (_T95[freedom - 1] if freedom <= len(_T95) else _T95_BEYOND) * found.standard_error
    return found.value - half, found.value + half


def smallest_visible(n: int, chance: float) -> float:
    """Return the smallest difference of two models that n records can resolve, in per cent.

    It is twice the standard error of a difference of two independent proportions. Pairing reduces it; seeds add to it.

    Args:
        n: Number of records.
        chance: The proportions, per cent; at least 5 is assumed.
    """
    share = min(max(chance, 5.0), 95.0) / 100
    return 100 * 2 * math.sqrt(2 * share * (1 - share) / n)


def _summary(key: Key, group: Sequence[Score]) -> Summary:
    over_seeds = mean([100 * score.value for score in group])
    errors = [score.standard_error for score in group if score.standard_error is not None]
    ids = group[0].records.keys()
    same = all(score.records.keys() == ids for score in group)
    records = {each: mean([score.records[each] for score in group]).value for each in ids} if same else {}
    return Summary(
        *key,
        metric=group[0].metric,
        value=over_seeds.value,
        over_seeds=over_seeds.standard_error,
        over_records=100 * mean(errors).value if errors else None,
        seeds=len(group),
        n=group[0].n,
        own=group[0].own,
        records=records,
        by_seed={score.seed: 100 * score.value for score in group},
    )
