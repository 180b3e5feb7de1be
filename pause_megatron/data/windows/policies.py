"""The placement policies that ship. Their arguments are described at `PlacementPolicy` and `WindowPolicy`. Pure numpy.

A policy chooses places; each gets `pause.run` pauses. "Pauses" here are places, of which there are M without runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pause_megatron.config.pauses import PATTERN
from pause_megatron.data.windows.text_window import PlacementPolicy, TextWindow, WindowPolicy
from pause_megatron.errors import ConfigError


def uniform(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw M gaps so that every interleaving of pauses with the text after its first token is equally likely."""
    # An interleaving is a choice of M of the T - 1 + M places after the first token. The j-th pause (from 0), at
    # place p, has p - j text tokens before it besides the first.
    places = rng.choice(text.size - 1 + count, count, replace=False, shuffle=False)
    places.sort()
    return places - np.arange(-1, count - 1)


def isolated(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw M distinct gaps, every choice equally likely, so that no two pauses (or runs) are adjacent."""
    return rng.choice(text.size, count, replace=False, shuffle=False) + 1


def with_replacement(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw M independent gaps. With few gaps, runs of pauses are more frequent than with `uniform`."""
    return rng.integers(1, text.size + 1, count)


def bernoulli(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Choose each gap with probability `rate`. The number of pauses varies, so the window must be `trim`."""
    return np.flatnonzero(rng.random(text.size) < rate) + 1


def interval(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return M evenly spaced gaps (spacings differ by at most one), shifted by a phase drawn for each sample."""
    # Integers throughout: in floating point the last gap could round up to T + 1.
    phase = rng.integers(text.size)
    return (np.arange(count) * text.size + phase) // max(count, 1) + 1


def every(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return the first M gaps: all of them, in a window whose text is as long as `PauseCounts` says.

    The last gap has no pause where the window ends with its text token.
    """
    return np.arange(1, count + 1)


class Scored:
    """Choose the M tokens of highest side value, and put pauses directly before them (DIT, arXiv:2506.03616).

    Of equal values the first ones are chosen. nan is never chosen, nor is the window's first token. Where fewer than M
    tokens have a value, their runs are longer: evenly, those of the highest values first. Without any, it is `uniform`.
    """

    def place(self, window: TextWindow, rng: np.random.Generator) -> np.ndarray:
        """Return the gaps of one window."""
        if window.side is None:
            raise ConfigError("expected a side array (data.side), got none")
        values = window.side[1:]  # of the tokens that gaps 1..T - 1 precede
        gaps = np.flatnonzero(~np.isnan(values)) + 1
        if not gaps.size:
            return uniform(window.text, window.count, window.rate, rng)
        times, rest = divmod(window.count, gaps.size)
        return np.concatenate([np.repeat(gaps, times), gaps[_highest(values[gaps - 1], rest)]])


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the highest values; of equal ones the first. A sort takes four times as long."""
    if not count:
        return np.empty(0, dtype=np.int64)
    least = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > least)
    return np.concatenate([above, np.flatnonzero(values == least)[: count - above.size]])


@dataclass(frozen=True)
class ByPattern:
    """Draw M places among those directly after, or before, the tokens whose text contains a match of a pattern.

    Every choice of M of them is equally likely. Where there are fewer, their runs are longer: evenly, and one longer at
    a random subset. Without any, it is `uniform`. There is no place before the first token of a window. A pattern that
    no token of the vocabulary matches is an error.

    Attributes:
        before: Whether pauses stand before the tokens.
        pattern: Regular expression.
    """

    before: bool
    pattern: str = PATTERN

    def place(self, window: TextWindow, rng: np.random.Generator) -> np.ndarray:
        """Return the gaps of one window."""
        if window.texts is None:
            raise ConfigError("expected a tokenizer, for the texts of tokens, got none")
        matches = window.texts.matches(self.pattern)
        # The last entry is that of ids outside the table: padding, which is -1, among them.
        found = matches[np.minimum(window.text, matches.size - 1)]
        gaps = np.flatnonzero(found[1:] if self.before else found) + 1
        if not gaps.size:
            if not matches.any():  # else every window would be `uniform`
                raise ConfigError(
                    f"pause.pattern: expected one that the text of a token matches, got {self.pattern!r}, which none "
                    f"of {len(window.texts):,} tokens does; it is searched in single tokens, with their leading blank"
                )
            return uniform(window.text, window.count, window.rate, rng)
        times, rest = divmod(window.count, gaps.size)
        return np.concatenate([np.repeat(gaps, times), rng.choice(gaps, rest, replace=False, shuffle=False)])


Policy = PlacementPolicy | WindowPolicy
"""A policy of either generation."""

POLICIES: dict[str, Policy] = {
    **{policy.__name__: policy for policy in (uniform, isolated, with_replacement, bernoulli, interval)},
    "scored": Scored(),
    "after": ByPattern(before=False),
    "before": ByPattern(before=True),
    "every": every,
}
"""The policies that ship, by the name used in `pause.placement`."""
