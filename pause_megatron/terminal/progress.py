"""Progress bars: what they are drawn on, and one over bytes for verbs that read and write large files."""

from __future__ import annotations

from typing import Any, TextIO

from tqdm import tqdm


def bar_file(stream: TextIO) -> Any:
    """What tqdm shall draw a bar on: a terminal itself; else a file that makes a line of each state of the bar."""
    return stream if stream.isatty() else _Lines(stream)


class _Lines:
    """A bar is drawn again and again behind carriage returns, which would be one endless line of a log."""

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


class ByteProgress:
    """Shows how far a stage is, once it has taken two seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm | None = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def report(self, stage: str, done: int, total: int) -> None:
        """Takes a report: what is being done, bytes done, bytes in all."""
        if self._bar is None or self._bar.desc != f"{stage}: ":
            self._close()
            self._bar = tqdm(
                desc=stage,
                total=total,
                unit="B",
                unit_scale=True,
                file=bar_file(self._stream),
                delay=2.0,
                mininterval=0.3 if self._stream.isatty() else 10.0,
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
