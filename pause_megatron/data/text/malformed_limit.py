"""The limit of malformed lines at which `prepare` stops."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.errors import DataError

# Before the end, a fraction is checked only after this many lines, and with this margin: shards differ.
_LINES_TO_JUDGE = 10_000
_MARGIN = 2.0


@dataclass(frozen=True)
class MalformedLimit:
    """The value of `--max-malformed`.

    Attributes:
        value: Number of lines (int), or fraction of all lines (float).

    Raises:
        DataError: A negative number, or a fraction above 1.
    """

    value: int | float

    def __post_init__(self) -> None:
        if self.value < 0 or (isinstance(self.value, float) and not self.value <= 1):
            raise DataError(
                f"--max-malformed: expected a number of lines, or a fraction from 0.0 to 1.0, got {self.value}"
            )

    @property
    def is_fraction(self) -> bool:
        """Whether the limit is a fraction of all lines."""
        return isinstance(self.value, float)

    def exceeded(self, malformed: int, documents: int) -> bool:
        """Return whether a finished preparation exceeds the limit.

        Args:
            malformed: Number of malformed lines.
            documents: Number of well-formed lines.
        """
        return malformed > (self.value * (documents + malformed) if self.is_fraction else self.value)

    def should_abort(self, malformed: int, documents: int, done_bytes: int, total_bytes: int | None) -> bool:
        """Return whether to stop an unfinished preparation.

        A number is checked exactly. A fraction is checked against an estimate of the total number of lines, with a
        margin of 2. Where the size of the input is unknown, a fraction is only checked at the end.

        Args:
            malformed: Number of malformed lines so far.
            documents: Number of well-formed lines so far.
            done_bytes: Bytes read so far, of the sources as stored.
            total_bytes: Size of the sources as stored, in bytes; None where unknown.
        """
        if not self.is_fraction:
            return malformed > self.value
        lines = malformed + documents
        if not total_bytes or not done_bytes or lines < _LINES_TO_JUDGE:
            return False
        return malformed > _MARGIN * self.value * lines * total_bytes / done_bytes
