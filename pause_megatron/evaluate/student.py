"""Student's t distribution for whole degrees of freedom, without scipy."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

_NORMAL = NormalDist()
_MANY = 1000


def two_sided(t: float, freedom: int) -> float:
    """Return the probability that |T| exceeds |t|.

    The finite series of Abramowitz & Stegun, 26.7.3 and 26.7.4; beyond 1,000 degrees of freedom the normal
    approximation 26.7.8, whose error there is below 1e-6.

    Args:
        t: The statistic.
        freedom: Degrees of freedom, 1 or more.
    """
    if freedom > _MANY:
        z = abs(t) * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom))
        return 2 * _NORMAL.cdf(-z)
    angle = math.atan(abs(t) / math.sqrt(freedom))
    squared = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = term if freedom > 1 else 0.0
    for power in range(3 if odd else 2, freedom - 1, 2):
        term *= squared * (power - 1) / power
        total += term
    inside = 2 / math.pi * (angle + total) if odd else total
    return min(max(1 - inside, 0.0), 1.0)


@functools.lru_cache(maxsize=256)
def quantile(confidence: float, freedom: int) -> float:
    """Return the t with P(|T| <= t) = confidence: 12.7 for 0.95 and 1 degree of freedom, 1.96 for very many.

    Args:
        confidence: Probability between 0 and 1.
        freedom: Degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 1 - confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - confidence else (low, middle)
    return high
