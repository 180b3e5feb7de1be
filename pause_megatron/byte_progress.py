"""A progress bar over bytes, one for each stage, for verbs that read and write large files."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm


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
                file=self._stream,
                delay=2.0,
                mininterval=0.3 if self._stream.isatty() else 10.0,
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
