"""Means of per-record scores, their errors and intervals, and comparisons of two models or of several seeds.

A score is 0 or 1 (exact match, accuracy) or a fraction (F1). Records of one group (`Example.group`) are not
independent; every error here counts groups. Two models with answers to the same records are compared record by record:
the difficulty of a record, which both share, then cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pause_megatron.errors import DataError
from pause_megatron.evaluate.clusters import Clusters
from pause_megatron.evaluate.student import quantile, two_sided

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error.

    Attributes:
        value: The mean.
        standard_error: Standard error, clustered by group; see `Clusters`. Without groups, for scores of 0 and 1, it is
            the binomial one, sqrt(p (1 - p) / (n - 1)). None for a single score or group.
        n: Number of scores.
        groups: Number of groups; n without groups. None if unknown.
    """

    value: float
    standard_error: float | None
    n: int
    groups: int | None = None


@dataclass(frozen=True)
class Difference:
    """The difference of two means over the same records, with its interval.

    Attributes:
        value: Mean of one - other.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Confidence level, 0..1.
        n: Number of records.
        resamples: Number of resamples.
        seed: Seed of the resampling.
        p_value: Two-sided p-value of no difference, of the sign-flip test; see `paired_bootstrap`.
        groups: Number of groups.
    """

    value: float
    low: float
    high: float
    confidence: float
    n: int
    resamples: int
    seed: int
    p_value: float = 1.0
    groups: int = 0


@dataclass(frozen=True)
class PairedT:
    """Paired differences, such as one for each seed, by Student's t.

    Attributes:
        value: Mean difference.
        low: Lower end of the 95 % interval; None for fewer than two differences, or if all of them are equal.
        high: Upper end; None likewise.
        p_value: Two-sided p-value of no difference; None likewise.
        n: Number of differences.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int


def mean(values: Sequence[float], groups: Sequence[str] | None = None) -> Mean:
    """Return mean and standard error of values, one for each record or one for each seed.

    Args:
        values: The values.
        groups: Group of each value; "", or None for all of them: the value is its own group.

    Raises:
        DataError: There are no values.
    """
    if not len(values):
        raise DataError("mean: expected at least one score, got none")
    clusters = Clusters.of(values, groups)
    return Mean(clusters.mean, clusters.standard_error, clusters.records, clusters.count)


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion (1927): 0 of 200 allows up to 1.9 %.

    Args:
        successes: Number of successes, 0..n.
        n: Number of trials, above 0.
        confidence: Confidence level, between 0 and 1.
    """
    return _score_interval(successes / n, n, _NORMAL.inv_cdf((1 + confidence) / 2))


def interval(
    scores: Sequence[float], groups: Sequence[str] | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the interval of a mean of scores in [0, 1], which it does not leave.

    Scores of 0 and 1 without groups: Wilson's interval. Otherwise Wilson's interval of the effective number of records,
    value (1 - value) / standard error^2 (Kish's design effect), with Student's t at the degrees of freedom of the
    standard error (`Clusters.freedom`). If all scores are equal the standard error says nothing. A group then counts
    as one record (`Clusters.effective`): with all 200 records wrong in 48 groups of equal size, 0 of 48.

    Args:
        scores: The scores, at least one.
        groups: Group of each score; "", or None for all of them: the score is its own group.
        confidence: Confidence level, between 0 and 1.
    """
    clusters = Clusters.of(scores, groups)
    value = min(max(clusters.mean, 0.0), 1.0)
    single = clusters.count == clusters.records
    if single and all(score in (0, 1) for score in scores):
        return wilson(value * clusters.records, clusters.records, confidence)
    error = clusters.standard_error
    if error is None:
        return wilson(value, 1, confidence)
    freedom, effective = clusters.freedom, clusters.effective
    if error > 1e-12 and 0 < value < 1:
        effective = value * (1 - value) / error**2
        if all(score in (0, 1) for score in scores):  # groups never make records worth more than they are
            effective = min(effective, clusters.records)
    return _score_interval(value, effective, quantile(confidence, freedom))


def interval_of(found: Mean, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a mean whose scores are not known, as of lm-eval, which gives value and standard error.

    Within [0, 1] it is Wilson's interval of the effective number of records. It is the normal interval for a value
    outside, such as a perplexity.

    Args:
        found: The mean.
        confidence: Confidence level, between 0 and 1.
    """
    value, error = found.value, found.standard_error
    if not 0 <= value <= 1:
        half = _NORMAL.inv_cdf((1 + confidence) / 2) * (error or 0.0)
        return value - half, value + half
    effective = value * (1 - value) / error**2 if error and 0 < value < 1 else max(found.n, 1)
    return wilson(value * effective, effective, confidence)


def paired_bootstrap(
    one: Mapping[str, float],
    other: Mapping[str, float],
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Return the difference of two means over the same records, with a bootstrap interval over groups of records.

    Groups are resampled whole. The interval is the expanded percentile interval (Hesterberg, "What Teachers Should Know
    About the Bootstrap", 2015, section 5.3): percentiles at the normal probabilities of t * sqrt(G / (G - 1)), with the
    degrees of freedom of `Clusters.freedom`. With many groups it is the percentile interval (Efron & Tibshirani, "An
    Introduction to the Bootstrap", chapter 13). If all groups have the same difference, resampling shows no spread. The
    interval then allows for as many groups with the opposite extreme, 1 or -1, as Wilson's interval for 0 of
    `Clusters.effective` groups does.

    The p-value is that of the sign-flip test (approximate randomization; Noreen 1989): without a difference, the sum of
    each group's differences has either sign with equal probability. It is exact for few groups, and the sign test
    (McNemar's exact test) for differences of 0 and 1. With r resamples it is not below 1 / (r + 1).

    Args:
        one: Score of each record, 0..1, by record id.
        other: Scores of the other model on the same records.
        groups: Group of each record by its id; "" or absent: the record is its own group.
        seed: Seed of the resampling; the same seed gives the same interval.
        resamples: Number of resamples; 10,000 fix the ends of a 95 % interval to about 2 % of its width.
        confidence: Confidence level, between 0 and 1.

    Raises:
        DataError: The ids differ, there are no records, or an argument is out of range.
    """
    _check_paired(one, other, resamples, confidence)
    ids = sorted(one)  # the interval does not depend on the order of records
    differences = np.array([one[record] - other[record] for record in ids], dtype=np.float64)
    clusters = Clusters.of(differences, None if groups is None else [groups.get(record, "") for record in ids])
    value, count = clusters.mean, clusters.count

    rng = np.random.default_rng(seed)
    p_value = clusters.sign_flip_p_value(np.random.default_rng([seed, 1]), resamples)

    def found(low: float, high: float) -> Difference:
        return Difference(value, low, high, confidence, len(ids), resamples, seed, p_value, count)

    if np.abs(clusters.residuals).max() <= 1e-12 * clusters.sizes.max():
        unseen = wilson(0, clusters.effective, confidence)[1]
        return found(value - unseen * (1 + value), value + unseen * (1 - value))
    means = clusters.resampled_means(rng, resamples)
    stretch, freedom = math.sqrt(count / (count - 1)), clusters.freedom
    tail = _NORMAL.cdf(-quantile(confidence, freedom) * stretch)
    low, high = np.quantile(means, [tail, 1 - tail])
    return found(float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down procedure (1979), in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def logit_interval(
    values: Sequence[float], confidence: float = 0.95, records: int = 1000
) -> tuple[float, float] | None:
    """Return the t-interval over seeds on the logit scale, which stays within [0, 1]; None for fewer than two values.

    Equal values say nothing of their spread. The interval is then Wilson's for the records of one seed.

    Args:
        values: One value for each seed, 0..1.
        confidence: Confidence level, between 0 and 1.
        records: Number of records behind each value. A value of 0 or 1, which has no logit, counts as half a record.
    """
    if len(values) < 2:
        return None
    if max(values) - min(values) < 1e-12:
        return wilson(values[0] * records, records, confidence)
    edge = 0.5 / records
    inside = [min(max(value, edge), 1 - edge) for value in values]
    found = mean([math.log(value / (1 - value)) for value in inside])
    assert found.standard_error is not None
    half = quantile(confidence, len(values) - 1) * found.standard_error
    low, high = (1 / (1 + math.exp(-end)) for end in (found.value - half, found.value + half))
    return low, high


def paired_t(differences: Sequence[float], confidence: float = 0.95) -> PairedT:
    """Return the mean of paired differences, its interval and p-value by Student's t.

    Args:
        differences: One difference for each seed.
        confidence: Confidence level, between 0 and 1.

    Raises:
        DataError: There are no differences.
    """
    found = mean(differences)
    if not found.standard_error or found.standard_error <= 1e-12 * max(map(abs, differences)):
        return PairedT(found.value, None, None, None, found.n)
    half = quantile(confidence, found.n - 1) * found.standard_error
    p_value = two_sided(found.value / found.standard_error, found.n - 1)
    return PairedT(found.value, found.value - half, found.value + half, p_value, found.n)


def _score_interval(value: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval for a proportion of n (effective) trials and a quantile z."""
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    low = 0.0 if value == 0 else max(centre - half, 0.0)
    return low, 1.0 if value == 1 else min(centre + half, 1.0)


def _check_paired(one: Mapping[str, float], other: Mapping[str, float], resamples: int, confidence: float) -> None:
    if resamples < 1 or not 0 < confidence < 1:
        raise DataError(
            f"paired bootstrap: expected 1 resample or more and 0 < confidence < 1, got {resamples} and {confidence}"
        )
    if one.keys() != other.keys():
        only = [sorted(set(a) - set(b)) for a, b in ((one, other), (other, one))]
        raise DataError(
            f"paired bootstrap: expected scores of the same records, got {len(only[0])} ids only on the left "
            f"(such as {only[0][:2]}) and {len(only[1])} only on the right (such as {only[1][:2]})"
        )
    if not one:
        raise DataError("paired bootstrap: expected at least one record, got none")
