"""Progress bars on standard error: drawn on a terminal, a line now and then in a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

Report = Callable[[str, int, int], None]
"""A progress callback, called with (stage, units done, units in all)."""

_TERMINAL_SECONDS, _LOG_SECONDS = 0.3, 10.0


def no_report(stage: str, done: int, total: int) -> None:
    """Ignore a progress report.

    Args:
        stage: What is being done.
        done: Units done.
        total: Units in all.
    """


def open_bar(stream: TextIO, description: str, **options: Any) -> tqdm[Any]:
    """Open a tqdm bar on a stream.

    Args:
        stream: Where it is drawn. On a terminal it moves; elsewhere each state is a line, at most every 10 s.
        description: What is being done.
        options: Further arguments of tqdm, such as total, initial, unit and bar_format.
    """
    seconds = _TERMINAL_SECONDS if stream.isatty() else _LOG_SECONDS
    return tqdm(desc=description, file=bar_file(stream), **{"mininterval": seconds, **options})


def bar_file(stream: TextIO) -> Any:
    """Return the terminal itself, or a file that makes a line of each state of a bar.

    Args:
        stream: Where the bar is drawn.
    """
    return stream if stream.isatty() else _Lines(stream)


class _Lines:
    """A bar is redrawn after carriage returns, which would be one endless line of a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        """Write what is drawn, unless it was drawn before; the length of the text."""
        line = text.strip()
        if line and line != self._last:
            self._last = line
            self._stream.write(f"{line}\n")
        return len(text)


class StageProgress:
    """A bar for a task of several stages. A stage is shown once it has taken two seconds.

    Args:
        stream: See `open_bar`.
        unit: What is counted: "B" for bytes, which get SI prefixes, or words such as " records".
    """

    def __init__(self, stream: TextIO, unit: str = "B") -> None:
        self._stream, self._unit = stream, unit
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def report(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is.

        Args:
            stage: What is being done.
            done: Units done.
            total: Units in all.
        """
        if self._bar is None or self._stage != stage:
            self._close()
            self._stage = stage
            self._bar = open_bar(
                self._stream, stage, total=total, unit=self._unit, unit_scale=self._unit == "B", delay=2.0
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
