"""How many malformed lines a preparation puts up with."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.errors import DataError

# A fraction is judged before the end only on so many lines, and only when it is passed by this factor: shards differ.
_LINES_TO_JUDGE = 10_000
_MARGIN = 2.0


@dataclass(frozen=True)
class MalformedLimit:
    """`--max-malformed`: a number of lines (int), or a fraction of all lines (float).

    Raises:
        DataError: a negative number, or a fraction above 1.
    """

    value: int | float

    def __post_init__(self) -> None:
        if self.value < 0 or (isinstance(self.value, float) and not self.value <= 1):
            raise DataError(f"--max-malformed {self.value}: expected a number of lines, or a fraction from 0.0 to 1.0")

    @property
    def is_fraction(self) -> bool:
        """Whether it counts relative to all lines."""
        return isinstance(self.value, float)

    def exceeded(self, malformed: int, documents: int) -> bool:
        """Whether a finished preparation has too many. `documents` are the lines that are none of them."""
        return malformed > (self.value * (documents + malformed) if self.is_fraction else self.value)

    def hopeless(self, malformed: int, documents: int, done_bytes: int, total_bytes: int | None) -> bool:
        """Whether to stop an unfinished preparation.

        A number is judged exactly. A fraction is judged against the lines that all of the input is likely to hold, and
        must be passed twice over; where the size of the input is unknown, it is judged at the end.

        Args:
            malformed: lines so far.
            documents: so far.
            done_bytes: read of the sources as stored.
            total_bytes: of the sources as stored, where known.
        """
        if not self.is_fraction:
            return malformed > self.value
        lines = malformed + documents
        if not total_bytes or not done_bytes or lines < _LINES_TO_JUDGE:
            return False
        return malformed > _MARGIN * self.value * lines * total_bytes / done_bytes
