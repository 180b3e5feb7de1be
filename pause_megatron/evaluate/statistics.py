"""Means, standard errors and the paired bootstrap of per-record scores.

A score is 0 or 1 (exact match, accuracy) or a fraction (F1). Two models with answers to the same records are compared
record by record: the difficulty of a record, which both share, then cancels.
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
    """A mean and its standard error.

    Attributes:
        value: The mean.
        standard_error: Sample standard deviation (n - 1) / sqrt(n). For scores of 0 and 1 it is the binomial one,
            sqrt(p (1 - p) / (n - 1)). None for a single score.
        n: Number of scores.
    """

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The difference of two means over the same records, with its interval.

    Attributes:
        value: Mean of a - b.
        low: Lower end of the percentile interval.
        high: Upper end of the percentile interval.
        confidence: Confidence level, 0..1.
        n: Number of records.
        resamples: Number of resamples.
        seed: Seed of the resampling.
    """

    value: float
    low: float
    high: float
    confidence: float
    n: int
    resamples: int
    seed: int


def mean(scores: Sequence[float]) -> Mean:
    """Return mean and standard error of scores, one for each record or one for each seed.

    Raises:
        DataError: There are no scores.
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
    """Return the difference of two means over the same records, with a bootstrap interval over records.

    The percentile interval of Efron & Tibshirani, "An Introduction to the Bootstrap", chapter 13. Differences with few
    distinct values (0/1 scores: -1, 0, 1) are resampled as counts. The distribution is the same, and no table of
    records x resamples is needed.

    Args:
        a: Score of each record by record id.
        b: Scores of the other model on the same records.
        seed: Seed of the resampling; the same seed gives the same interval.
        resamples: Number of resamples; 10,000 fix the ends of a 95 % interval to about 2 % of its width.
        confidence: Confidence level, between 0 and 1.

    Raises:
        DataError: The ids differ, there are no records, or an argument is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise DataError(
            f"paired bootstrap: expected 1 resample or more and 0 < confidence < 1, got {resamples} and {confidence}"
        )
    if a.keys() != b.keys():
        only = [sorted(set(one) - set(other)) for one, other in ((a, b), (b, a))]
        raise DataError(
            f"paired bootstrap: expected scores of the same records, got {len(only[0])} ids only on the left "
            f"(such as {only[0][:2]}) and {len(only[1])} only on the right (such as {only[1][:2]})"
        )
    if not a:
        raise DataError("paired bootstrap: expected at least one record, got none")
    ids = sorted(a)  # the interval does not depend on the order of records
    differences = np.array([a[record] - b[record] for record in ids], dtype=np.float64)
    means = resampled_means(differences, np.random.default_rng(seed), resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(differences.mean()), float(low), float(high), confidence, len(ids), resamples, seed)


def resampled_means(differences: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Return the means of samples with replacement, fp64 [resamples].

    Args:
        differences: The values, fp64 [records].
        rng: Random generator.
        resamples: Number of resamples.
    """
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
