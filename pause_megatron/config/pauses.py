"""The number of pauses and text tokens in a window, and which pause options fit together.

Used by `config.rules` for a configuration and by `data.windows.pause` for a dataset in a script.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PLACEMENTS = (
    *("uniform", "isolated", "with_replacement", "bernoulli", "interval"),
    *("scored", "after", "before", "every"),
)
"""Placement policies that ship; others are named 'module:attribute'."""

BY_PATTERN = ("after", "before")
"""Placement policies that use `pause.pattern`."""

PATTERN = "[.,:;!?]"
"""Default of `pause.pattern`: punctuation."""

OBJECTIVES = ("cross_entropy", "anytime", "cyb_anytime", "cyb_variational", "cyb_budget")
"""Objectives that ship; others are named 'module:attribute'."""


def pauses_per_window(rate: float, sequence_length: int) -> int:
    """Return M = round(rate x N), the pauses inserted into a window of N tokens (Goyal et al., section 3.1).

    Args:
        rate: `pause.rate`, a fraction of N.
        sequence_length: N, input tokens of a window.
    """
    return round(rate * sequence_length)


@dataclass(frozen=True)
class PauseCounts:
    """Pauses and text tokens of a window (Goyal et al., section 3.1).

    A window holds N + 1 tokens, of which the first N are inputs and the last N are targets. Its first token is always
    text, so M pauses spread over the N places after it (exact), or over N + M places of which the cut leaves N (trim).
    `every` fills the window with tokens and the `run` pauses after each, whatever the rate, unless that is 0.

    Attributes:
        sequence_length: N, input tokens of a window.
        rate: `pause.rate`, pauses inserted as a fraction of N.
        window: `pause.window`, "exact" or "trim".
        placement: `pause.placement`.
        run: `pause.run`, consecutive pauses at a place.
    """

    sequence_length: int
    rate: float
    window: str
    placement: str = "uniform"
    run: int = 1

    @property
    def inserted(self) -> int:
        """M, pauses before the cut of a trim window."""
        if self.placement == "every" and self.rate:
            return self.sequence_length + 1 - -(-(self.sequence_length + 1) // (self.run + 1))
        return pauses_per_window(self.rate, self.sequence_length)

    @property
    def places(self) -> int:
        """Places that a policy chooses: ceil(M / run). The last of them gets what is left of M."""
        return -(-self.inserted // self.run)

    @property
    def fraction(self) -> float:
        """M as a fraction of N: about `pause.rate`, except for `every`."""
        return self.inserted / self.sequence_length

    @property
    def nominal_rate(self) -> float:
        """Pauses as a fraction of a long window: `pause.rate`, except for `every`, which uses that as a switch only."""
        return self.run / (self.run + 1) if self.placement == "every" and self.rate else self.rate

    @property
    def text_length(self) -> int:
        """T, text tokens drawn for a window: N + 1 - M (exact) or N + 1 (trim)."""
        return self.sequence_length + 1 - (0 if self.window == "trim" else self.inserted)

    @property
    def expected(self) -> float:
        """Expected pauses among the N + 1 tokens of a window, for the uniform policy: M, or M x N / (N + M) (trim).

        With runs in a trim window it is an approximation by renewal theory, to about half a pause.
        """
        if self.window != "trim":
            return float(self.inserted)
        size, whole, edge = self.sequence_length, self.places * self.run, self._edge
        return (whole + 2 * edge) * size / (size + whole) - edge

    @property
    def input_fraction(self) -> float:
        """Expected pauses per input token, for the uniform policy: all but those at the last of the N + 1 places."""
        size = self.sequence_length
        if self.placement == "every" and self.rate:
            return (size - -(-size // (self.run + 1))) / size
        if self.run > 1:
            # In an exact window, the last place is a pause where a run is the last of all texts and runs.
            at_the_end = self.places / (size - self.inserted + self.places)
            if self.window == "trim":
                at_the_end = self.expected / size
            return (self.expected - at_the_end) / size
        slots = size + (self.inserted if self.window == "trim" else 0)
        return self.inserted / slots * (size - 1) / size

    @property
    def _edge(self) -> float:
        """Pauses that the ends of a window have less than its middle, where a run has just begun or must end."""
        items = self.sequence_length + self.places
        text, runs = self.sequence_length / items, self.places / items
        length = text + runs * self.run
        return text * runs * self.run * (self.run - 1) / (2 * length**2)


def pattern_error(pattern: str) -> str | None:
    """Return why a regular expression is not one, with the position; None where it is one.

    Args:
        pattern: `pause.pattern`.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def placement_conflict(counts: PauseCounts) -> tuple[tuple[str, ...], str] | None:
    """Find pause options that do not fit together.

    Args:
        counts: Pauses and text tokens of a window.

    Returns:
        The keys and what is expected of them; None where they fit.
    """
    placement = counts.placement
    if counts.window != "exact":
        if placement == "every" and counts.rate > 0:
            keys = ("pause.placement", "pause.window")
            return keys, "pause.window=exact with every: its window holds as much text as the pauses leave room for"
        return None
    if placement == "bernoulli" and counts.rate > 0:
        keys = ("pause.placement", "pause.window")
        return keys, "pause.window=trim with bernoulli: an exact window needs the same number of pauses every time"
    if counts.text_length < 2:
        keys = ("pause.run" if placement == "every" else "pause.rate", "data.sequence_length")
        return keys, (
            f"at least 2 text tokens in a window of {counts.sequence_length} + 1 tokens with {counts.inserted} pauses"
        )
    if placement == "isolated" and counts.places > counts.text_length:
        keys = ("pause.rate", "pause.placement")
        unit = "pauses" if counts.run == 1 else f"runs of {counts.run} pauses"
        return keys, (
            f"no more {unit} ({counts.places}) than text tokens ({counts.text_length}), so that no two "
            f"{'pauses' if counts.run == 1 else 'runs'} touch"
        )
    return None
