"""Records in groups: sums by group, the standard error of a mean that groups correlate, and its degrees of freedom.

Records that share a text (an article, a story) are right or wrong together. The groups are therefore the independent
units: the residual of a group is the sum of its records' deviations from the mean (the linearised ratio estimator;
Cochran, "Sampling Techniques", 1977, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Clusters:
    """Values summed by group.

    Attributes:
        sums: Sum of the values of each group, fp64 [groups].
        sizes: Number of records of each group, fp64 [groups].
    """

    sums: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, groups: Sequence[str] | None = None) -> Clusters:
        """Return the sums of values by group.

        Args:
            values: One value for each record, at least one.
            groups: Group of each record; "" (or None for all): the record is a group of its own.
        """
        flat = np.asarray(values, dtype=np.float64)
        if groups is None:
            return cls(flat, np.ones_like(flat))
        if len(groups) != flat.size:
            raise ValueError(f"groups: expected one for each of {flat.size} values, got {len(groups)}")
        numbers: dict[object, int] = {}
        keys = [group if group else index for index, group in enumerate(groups)]
        index = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        return cls(np.bincount(index, weights=flat), np.bincount(index).astype(np.float64))

    @property
    def count(self) -> int:
        """Number of groups, G."""
        return self.sums.size

    @property
    def records(self) -> int:
        """Number of records, n."""
        return int(self.sizes.sum())

    @property
    def mean(self) -> float:
        """Mean over records."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def effective(self) -> float:
        """Number of groups of equal size with the same sum of squared sizes: (sum m)^2 / sum m^2."""
        return float(self.sizes.sum() ** 2 / (self.sizes**2).sum())

    @property
    def residuals(self) -> np.ndarray:
        """Sum of the deviations from the mean in each group, fp64 [groups]."""
        return self.sums - self.mean * self.sizes

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean: sqrt(G / (G - 1) * sum of squared residuals) / n. None for one group.

        For groups of one record it is the sample standard deviation (n - 1) / sqrt(n).
        """
        if self.count < 2:
            return None
        squares = float((self.residuals**2).sum())
        return math.sqrt(self.count / (self.count - 1) * squares) / self.records

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the standard error, 1 to G - 1.

        2 v^2 / Var(v), with the variance of v = sum of squared residuals estimated from their fourth powers
        (Satterthwaite 1946). Where few groups carry the spread, as near the floor or with one very large group, the
        standard error is itself uncertain, and the degrees of freedom are few.
        """
        squares = self.residuals**2
        total = float(squares.sum())
        spread = float((squares**2).sum()) - total**2 / self.count
        most = max(self.count - 1, 1)
        if spread <= 1e-12 * total**2:
            return most
        return max(1, min(most, int(2 * total**2 / spread)))

    def sign_flip_p_value(self, rng: np.random.Generator, resamples: int) -> float:
        """Return the two-sided p-value of the sum of all values, if the sign of each group's sum is a fair coin.

        All signs are tried where that takes no more than `resamples` sums, which makes it exact.

        Args:
            rng: Random numbers of the signs.
            resamples: Number of random signs of all groups.
        """
        sums = self.sums[self.sums != 0]
        if not sums.size:
            return 1.0
        least = abs(float(sums.sum())) - 1e-9 * float(np.abs(sums).sum())
        if sums.size < 63 and 1 << sums.size <= resamples:
            totals = np.zeros(1)
            for one in sums:
                totals = np.concatenate((totals + one, totals - one))
            return float((np.abs(totals) >= least).mean())
        beyond, block = 0, max(1, _BLOCK // sums.size)
        for start in range(0, resamples, block):
            signs = rng.integers(0, 2, (min(block, resamples - start), sums.size), dtype=np.int8)
            beyond += int((np.abs(2 * (signs @ sums) - sums.sum()) >= least).sum())
        return (beyond + 1) / (resamples + 1)

    def resampled_means(self, rng: np.random.Generator, resamples: int) -> np.ndarray:
        """Return the means of samples of whole groups with replacement, fp64 [resamples].

        Groups with few distinct (sum, size), as single records with 0/1 scores have, are resampled as counts. The
        distribution is the same, and no table of groups x resamples is needed.

        Args:
            rng: Random generator.
            resamples: Number of resamples.
        """
        kinds, counts = np.unique(np.stack([self.sums, self.sizes]), axis=1, return_counts=True)
        if counts.size <= 64:
            drawn = rng.multinomial(self.count, counts / self.count, size=resamples)
            return (drawn @ kinds[0]) / (drawn @ kinds[1])
        means = np.empty(resamples)
        step = max(1, _BLOCK // self.count)
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            picked = rng.integers(self.count, size=(size, self.count))
            means[start : start + size] = self.sums[picked].sum(axis=1) / self.sizes[picked].sum(axis=1)
        return means
