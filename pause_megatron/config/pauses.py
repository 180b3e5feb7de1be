"""The number of pauses and text tokens in a window, and which pause options fit together.

Used by `config.rules` for a configuration and by `data.windows.pause` for a dataset in a script.
"""

from __future__ import annotations

from dataclasses import dataclass

PLACEMENTS = (
    *("uniform", "isolated", "with_replacement", "bernoulli", "interval"),
    *("scored", "after", "before", "every"),
)
"""Placement policies that ship; others are named 'module:attribute'."""

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

    Attributes:
        sequence_length: N, input tokens of a window.
        rate: `pause.rate`, pauses inserted as a fraction of N.
        window: `pause.window`, "exact" or "trim".
    """

    sequence_length: int
    rate: float
    window: str

    @property
    def inserted(self) -> int:
        """M, pauses before the cut of a trim window."""
        return pauses_per_window(self.rate, self.sequence_length)

    @property
    def text_length(self) -> int:
        """T, text tokens drawn for a window: N + 1 - M (exact) or N + 1 (trim)."""
        return self.sequence_length + 1 - (0 if self.window == "trim" else self.inserted)

    @property
    def expected(self) -> float:
        """Expected pauses among the N + 1 tokens of a window, for the uniform policy: M, or M x N / (N + M) (trim)."""
        return self.inserted * self.sequence_length / self._places

    @property
    def input_fraction(self) -> float:
        """Expected pauses per input token: N - 1 of the N places after the first token are inputs."""
        return self.inserted / self._places * (self.sequence_length - 1) / self.sequence_length

    @property
    def _places(self) -> int:
        return self.sequence_length + (self.inserted if self.window == "trim" else 0)


def placement_conflict(counts: PauseCounts, placement: str) -> tuple[tuple[str, ...], str] | None:
    """Find pause options that do not fit together.

    Args:
        counts: Pauses and text tokens of a window.
        placement: `pause.placement`.

    Returns:
        The keys and what is expected of them; None where they fit.
    """
    if counts.window != "exact":
        return None
    if placement == "bernoulli" and counts.rate > 0:
        keys = ("pause.placement", "pause.window")
        return keys, "pause.window=trim with bernoulli: an exact window needs the same number of pauses every time"
    if counts.text_length < 2:
        keys = ("pause.rate", "data.sequence_length")
        return keys, (
            f"at least 2 text tokens in a window of {counts.sequence_length} + 1 tokens with {counts.inserted} pauses"
        )
    if placement == "isolated" and counts.inserted > counts.text_length:
        keys = ("pause.rate", "pause.placement")
        return keys, (
            f"no more pauses ({counts.inserted}) than text tokens ({counts.text_length}), so that no two pauses touch"
        )
    return None
