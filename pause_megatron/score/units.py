"""Units of a scoring: what one process computes, and writes to a file, at a time; and the batches of a unit."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

_UNITS = 256
_LEAST, _MOST = 1 << 13, 1 << 20


class Batch(NamedTuple):
    """What the model reads in a forward pass, and which values that gives. Shorter rows are padded on the right.

    Attributes:
        inputs: Token ids, int64 [rows, tokens].
        targets: The id that follows each of them, int64 [rows, tokens].
        scored: Whether a target gets a value, bool [rows, tokens].
        places: Place of each of these values, row by row, among those of the unit, int64 [scored].
    """

    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    places: np.ndarray


class Unit(Protocol):
    """A range of values that one process computes. Its text names it in messages, and its length is their number."""

    @property
    def number(self) -> int:
        """Its number, from 0."""
        ...

    def __len__(self) -> int: ...

    def place(self, at: int) -> str:
        """Return what a value is of, for messages.

        Args:
            at: Its place among those of the unit.
        """
        ...


def unit_tokens(tokens: int) -> int:
    """Return the approximate size of a unit.

    Args:
        tokens: Number of tokens of the corpus, or of the examples of a task.
    """
    return min(max(tokens // _UNITS, _LEAST), _MOST)
