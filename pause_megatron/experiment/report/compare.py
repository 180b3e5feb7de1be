"""Scores over seeds with their intervals, and comparisons of variants with the baseline, corrected for their number."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pause_megatron.evaluate.statistics import holm, interval, logit_interval, mean, paired_bootstrap, paired_t, wilson
from pause_megatron.experiment.report.collect import Score

LEVEL = 0.05
"""Corrected p-values below it are called supported."""

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
        records_by_seed: Score of each record by seed; empty if seeds have different records.
        by_seed: Value of each seed, per cent.
        groups: Number of groups of records.
        record_low: Lower end of the 95 % interval over records (of the records' means over seeds; by group).
        record_high: Upper end of that interval.
        seed_low: Lower end of the 95 % interval over seeds (Student's t on the logit scale); None with one seed.
        seed_high: Upper end of that interval; None with one seed.
        group_of: Group of each record that has one.
        cells: Folder names of the evaluations by seed.
        data: Fingerprint of the records; "" if it differs between seeds.
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
    records_by_seed: Mapping[int, Mapping[str, float]]
    by_seed: Mapping[int, float]
    groups: int
    record_low: float
    record_high: float
    seed_low: float | None
    seed_high: float | None
    group_of: Mapping[str, str]
    cells: Mapping[int, str]
    data: str

    def over(self, seeds: Iterable[int]) -> Mapping[str, float]:
        """Return the score of each record averaged over some seeds, 0..1."""
        return _averaged([self.records_by_seed[seed] for seed in seeds])

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval that tables and plots show: the lower one of both intervals."""
        return self.record_low if self.seed_low is None else min(self.record_low, self.seed_low)

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval that tables and plots show: the higher one of both intervals."""
        return self.record_high if self.seed_high is None else max(self.record_high, self.seed_high)


@dataclass(frozen=True)
class Comparison:
    """The difference of a variant from the baseline on the same records, in per cent.

    Attributes:
        difference: Mean over records and seeds.
        low: Lower end of the 95 % interval of the paired bootstrap over records, by group.
        high: Upper end of that interval.
        seed_low: Lower end of the 95 % interval over seeds (paired by seed, Student's t); None with one seed.
        seed_high: Upper end of that interval; None with one seed.
        p_records: Two-sided p-value over records.
        p_seeds: Two-sided p-value over seeds; None with one seed, or if all seeds differ by the same.
        seeds: Number of seeds that both have.
        p_holm: `p` adjusted for the number of comparisons in the report; None without `p`.
    """

    difference: float
    low: float
    high: float
    seed_low: float | None
    seed_high: float | None
    p_records: float
    p_seeds: float | None
    seeds: int
    p_holm: float | None = None

    @property
    def p(self) -> float | None:
        """The larger p-value: that neither records nor seeds explain the difference. None if one is unknown."""
        return None if self.p_seeds is None else max(self.p_records, self.p_seeds)

    @property
    def supported(self) -> bool:
        """Whether neither records nor seeds explain the difference, after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL


def summarise(scores: Iterable[Score]) -> dict[Key, Summary]:
    """Return scores over their seeds by (variant, task, M_ft, M_inf)."""
    groups: dict[Key, list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.variant, score.task, score.m_ft, score.m_inf].append(score)
    return {key: _summary(key, group) for key, group in groups.items()}


def compare(one: Summary, baseline: Summary) -> Comparison | None:
    """Return the comparison of a variant with the baseline on the seeds of both; None if records or all seeds differ.

    Args:
        one: The variant.
        baseline: The baseline on the same task.
    """
    if not one.records or one.records.keys() != baseline.records.keys() or one.data != baseline.data:
        return None
    seeds = sorted(one.by_seed.keys() & baseline.by_seed.keys())
    if not seeds:
        return None
    over_records = paired_bootstrap(one.over(seeds), baseline.over(seeds), one.group_of)
    over_seeds = paired_t([one.by_seed[seed] - baseline.by_seed[seed] for seed in seeds])
    return Comparison(
        100 * over_records.value,
        100 * over_records.low,
        100 * over_records.high,
        over_seeds.low,
        over_seeds.high,
        over_records.p_value,
        over_seeds.p_value,
        len(seeds),
    )


def corrected(comparisons: Mapping[tuple[str, str], Comparison]) -> dict[tuple[str, str], Comparison]:
    """Return the comparisons with p-values adjusted for their number (Holm); one without p-value counts as p = 1.

    Args:
        comparisons: All comparisons of a report by (variant, task).
    """
    adjusted = holm([1.0 if each.p is None else each.p for each in comparisons.values()])
    return {
        key: dataclasses.replace(each, p_holm=None if each.p is None else value)
        for (key, each), value in zip(comparisons.items(), adjusted, strict=True)
    }


def smallest_visible(one: Summary) -> float:
    """Return the smallest difference of two models that the records can resolve, in per cent.

    It is twice the standard error of a difference of two independent models, from the clustered standard error, and not
    less than that of independent proportions of at least 5 %. Pairing reduces it; seeds add to it.

    Args:
        one: A model's summary.
    """
    share = min(max(one.value, 5.0), 95.0) / 100
    independent = 100 * math.sqrt(share * (1 - share) / one.n)
    return 2 * math.sqrt(2) * max(independent, one.over_records or 0.0)


def _averaged(scores: Collection[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean score of each record."""
    first = next(iter(scores))
    return {each: math.fsum(one[each] for one in scores) / len(scores) for each in first}


def _summary(key: Key, group: Sequence[Score]) -> Summary:
    values = [score.value for score in group]
    over_seeds = mean([100 * value for value in values])
    errors = [score.standard_error for score in group if score.standard_error is not None]
    first, ids = group[0], group[0].records.keys()
    same = all(score.records.keys() == ids for score in group)
    records_by_seed = {score.seed: score.records for score in group} if same else {}
    records = _averaged(records_by_seed.values()) if same else {}
    if records:
        by_record = interval(list(records.values()), [first.groups.get(name, "") for name in records])
    else:
        by_record = wilson(over_seeds.value / 100 * first.n, first.n)
    by_seed = logit_interval(values, records=first.n) or (None, None)
    return Summary(
        *key,
        metric=first.metric,
        value=over_seeds.value,
        over_seeds=over_seeds.standard_error,
        over_records=100 * mean(errors).value if errors else None,
        seeds=len(group),
        n=first.n,
        own=first.own,
        records=records,
        records_by_seed=records_by_seed,
        by_seed={score.seed: 100 * score.value for score in group},
        groups=first.group_count,
        record_low=100 * by_record[0],
        record_high=100 * by_record[1],
        seed_low=None if by_seed[0] is None else 100 * by_seed[0],
        seed_high=None if by_seed[1] is None else 100 * by_seed[1],
        group_of=first.groups,
        cells={score.seed: score.cell for score in group},
        data=first.data if len({score.data for score in group}) == 1 else "",
    )
