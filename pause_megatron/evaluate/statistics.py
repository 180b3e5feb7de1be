"""What a set of per-record scores says, and how sure one may be of it.

A score is a number for each record: 0 or 1 (exact match, accuracy) or a fraction (F1). Two models that answered the
same records are compared record by record: what is hard for both cancels out, which no comparison of two means sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pause_megatron.errors import DataError

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Mean:
    """A mean and how far it may be off.

    Attributes:
        value: the mean.
        standard_error: sample standard deviation (n - 1) / sqrt(n). For scores of 0 and 1 that is the binomial one,
            sqrt(p (1 - p) / (n - 1)). None for a single score, which says nothing of its spread.
        n: scores.
    """

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How much better a is than b on the same records.

    Attributes:
        value: mean of a - b.
        low, high: ends of the percentile interval.
        confidence: of the interval, 0..1.
        n: records.
        resamples: that the interval was read from.
        seed: of the resampling.
    """

    value: float
    low: float
    high: float
    confidence: float
    n: int
    resamples: int
    seed: int


def mean(scores: Sequence[float]) -> Mean:
    """Mean and standard error of per-record scores. Seeds are aggregated with it too: one score for each seed.

    Raises:
        DataError: no scores.
    """
    if not len(scores):
        raise DataError("mean: expected at least one score, got none")
    values = np.asarray(scores, dtype=np.float64)
    error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None
    return Mean(float(values.mean()), error, values.size)


def paired_bootstrap(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Difference of two means over the same records, with a bootstrap interval: records are drawn, not scores.

    The percentile interval of Efron & Tibshirani, "An Introduction to the Bootstrap", chapter 13. Differences of a few
    distinct values (0/1 scores: -1, 0, 1) are resampled as counts, which is the same distribution and needs no table of
    records x resamples.

    Args:
        a, b: score of each record, by the record's id.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many; 10,000 settle the ends of a 95 % interval to about 2 % of its width.
        confidence: between 0 and 1.

    Raises:
        DataError: the ids differ, or there are none; a value out of its range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise DataError(
            f"paired bootstrap: expected 1 resample or more and 0 < confidence < 1, got {resamples} and {confidence}"
        )
    if a.keys() != b.keys():
        only = [sorted(set(one) - set(other)) for one, other in ((a, b), (b, a))]
        raise DataError(
            f"paired bootstrap: expected scores of the same records; {len(only[0])} ids stand only on the left side "
            f"(such as {only[0][:2]}), {len(only[1])} only on the right (such as {only[1][:2]})"
        )
    if not a:
        raise DataError("paired bootstrap: expected at least one record, got none")
    ids = sorted(a)  # the interval does not depend on the order in which records come
    differences = np.array([a[record] - b[record] for record in ids], dtype=np.float64)
    means = _resampled_means(differences, np.random.default_rng(seed), resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(differences.mean()), float(low), float(high), confidence, len(ids), resamples, seed)


def _resampled_means(differences: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of samples with replacement, fp64 [resamples]."""
    values, counts = np.unique(differences, return_counts=True)
    n = differences.size
    if values.size <= 64:
        return rng.multinomial(n, counts / n, size=resamples) @ values / n
    means = np.empty(resamples)
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = differences[rng.integers(n, size=(size, n))].mean(axis=1)
    return means
