"""The progress bar of `prepare`: documents/s, MB/s of text, tokens/s and remaining time, on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TextIO

from pause_megatron.data.prepare.pool import PrepareProgress
from pause_megatron.terminal.progress import open_bar

if TYPE_CHECKING:
    from tqdm import tqdm

_FORMAT = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"
_FORMAT_OPEN = "{desc} {elapsed}{postfix}"


class PrepareBar:
    """A progress bar for `PrepareProgress` reports. Its rates do not count the shards of earlier runs.

    Args:
        stream: Terminal or log to draw on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._first: PrepareProgress | None = None
        self._begun = time.perf_counter()

    def __enter__(self) -> PrepareBar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, progress: PrepareProgress) -> None:
        """Show a report."""
        bar, first = self._bar, self._first
        if bar is None or first is None or progress.phase != first.phase:
            bar, first = self._open(progress), progress
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        postfix = f"shard {progress.shards_done:,} of {progress.shards:,}"
        if progress.phase == "read":
            documents = (progress.documents - first.documents) / seconds
            text = (progress.text_bytes - first.text_bytes) / seconds / 1e6
            tokens = (progress.tokens - first.tokens) / seconds
            postfix = f"{documents:,.0f} documents/s, {text:,.2f} MB/s, {tokens:,.0f} tokens/s, {postfix}"
        if progress.malformed:
            postfix += f", {progress.malformed:,} malformed"
        bar.set_postfix_str(postfix, refresh=False)
        bar.update((progress.documents if progress.total_bytes is None else progress.done_bytes) - bar.n)

    def _open(self, progress: PrepareProgress) -> tqdm[Any]:
        if self._bar is not None:
            self._bar.close()
        self._first = progress
        self._begun = time.perf_counter()
        self._bar = open_bar(
            self._stream,
            {"read": "prepare", "join": "join shards"}[progress.phase],
            total=progress.total_bytes,
            initial=progress.done_bytes if progress.total_bytes is not None else progress.documents,
            miniters=0,
            bar_format=_FORMAT if progress.total_bytes is not None else _FORMAT_OPEN,
            dynamic_ncols=True,
        )
        return self._bar
