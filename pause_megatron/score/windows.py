"""Units and windows of a corpus: which tokens are scored together, and what the model reads for each of them.

A document is read in windows of at most `context` tokens. The first window begins at the document's first token, each
further one half a context later, and it gives the values of those tokens that the window before does not reach. So
each token has at least half a context before it, or all of its document. A unit is a range of tokens whose windows are
computed together. Units depend on the corpus and the context only, so no value depends on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import read_lengths
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.errors import DataError
from pause_megatron.score.units import Batch


@dataclass(frozen=True)
class Window:
    """A part of a document that is read at once.

    Attributes:
        first: Number of its first token in the corpus.
        stop: Number of the token after its last one.
        scored: Number of the first token whose value it gives.
        begins: Whether its first token is the document's first one, which has no token before it.
    """

    first: int
    stop: int
    scored: int
    begins: bool

    def __len__(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class CorpusUnit:
    """A range of tokens that one process scores.

    Attributes:
        number: Its number, from 0.
        start: Number of its first token in the corpus.
        stop: Number of the token after its last one.
        documents: Numbers of the first token and of the token after the last one of each document that it has tokens
            of, int64 [documents, 2].
    """

    number: int
    start: int
    stop: int
    documents: np.ndarray

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"unit {self.number:,} (tokens {self.start:,} to {self.stop - 1:,})"

    def place(self, at: int) -> str:
        """Return what a value is of, for messages.

        Args:
            at: Its place among those of the unit.
        """
        return f"token {self.start + at:,}"

    def windows(self, context: int) -> list[Window]:
        """Return the windows whose tokens it has, in order.

        Args:
            context: Largest number of tokens of a window, at least 2.
        """
        half, found = context // 2, []
        for first, stop in self.documents.tolist():
            number = max(1, -(-(self.start - first - context) // half) + 1) if self.start > first else 0
            while (scored := first + ((number - 1) * half + context if number else 0)) < min(stop, self.stop):
                begin = first + number * half
                found.append(Window(begin, min(begin + context, stop), scored, number == 0))
                number += 1
        return found


def document_offsets(prefix: str | Path, documents: int) -> np.ndarray:
    """Return the number of the first token of each document, and the number of tokens, int64 [documents + 1].

    Args:
        prefix: PREFIX of the corpus.
        documents: Number of its documents.
    """
    offsets = np.zeros(documents + 1, dtype=np.int64)
    at = 1
    for lengths in read_lengths(path_of(prefix, "idx"), documents):
        offsets[at : at + len(lengths)] = lengths
        at += len(lengths)
    return np.cumsum(offsets, out=offsets)


def units_of(offsets: np.ndarray, context: int, size: int) -> Iterator[CorpusUnit]:
    """Yield the units of a corpus in order. Together they have each token once.

    Args:
        offsets: See `document_offsets`.
        context: Largest number of tokens of a window, at least 2.
        size: Approximate number of tokens of a unit; no window is divided.
    """
    tokens = int(offsets[-1])
    stop = 0
    for number in range(-(-tokens // size)):
        start, stop = stop, _boundary(offsets, context, min((number + 1) * size, tokens))
        if start < stop:
            first = int(np.searchsorted(offsets, start, side="right")) - 1
            last = int(np.searchsorted(offsets, stop, side="left"))
            yield CorpusUnit(
                number, start, stop, np.stack([offsets[first:last], offsets[first + 1 : last + 1]], axis=1)
            )


def _boundary(offsets: np.ndarray, context: int, token: int) -> int:
    """Return the first token at or after `token` at which the values of a window begin."""
    after = int(np.searchsorted(offsets, token, side="left"))
    if offsets[after] == token:
        return token
    first, stop = int(offsets[after - 1]), int(offsets[after])
    half = context // 2
    scored = first + context + max(0, -(-(token - first - context) // half)) * half
    return min(scored, stop)


def batches_of(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yield windows in batches of similar length, the longest first.

    Args:
        windows: The windows of a unit.
        batch_tokens: Largest number of tokens of a batch, padding included; at least the longest window.
    """
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: (-len(window), window.first)):
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@dataclass(frozen=True)
class CorpusReader:
    """Reads the batches of the units of a corpus.

    Attributes:
        prefix: PREFIX of the corpus.
        bin_dtype: Data type of the ids in `.bin`.
        start: Id that the first token of a document is predicted from.
        context: Largest number of tokens of a window.
        batch_tokens: Largest number of tokens of a batch.
        vocabulary: Number of rows of the model's embedding.
        pauses: Ids of the model's pauses.
    """

    prefix: str
    bin_dtype: str
    start: int
    context: int
    batch_tokens: int
    vocabulary: int
    pauses: range

    def __call__(self, unit: CorpusUnit) -> Iterator[Batch]:
        """Yield the batches of a unit.

        Args:
            unit: The unit.

        Raises:
            DataError: An id of it is not the model's.
        """
        tokens = np.memmap(path_of(self.prefix, "bin"), dtype=self.bin_dtype, mode="r")
        self._check_ids(unit, tokens[unit.start : unit.stop])
        for windows in batches_of(unit.windows(self.context), self.batch_tokens):
            inputs = np.zeros((len(windows), len(windows[0])), dtype=np.int64)
            targets, scored = np.zeros_like(inputs), np.zeros(inputs.shape, dtype=bool)
            for row, window in enumerate(windows):
                targets[row, : len(window)] = tokens[window.first : window.stop]
                inputs[row, 1 : len(window)] = targets[row, : len(window) - 1]
                inputs[row, 0] = self.start if window.begins else tokens[window.first - 1]
                scored[row, window.scored - window.first : len(window)] = True
            places = np.concatenate([np.arange(window.scored, window.stop) for window in windows]) - unit.start
            yield Batch(inputs, targets, scored, places)

    def _check_ids(self, unit: CorpusUnit, tokens: np.ndarray) -> None:
        wrong = (tokens >= self.vocabulary) | (tokens < 0)
        if self.pauses:
            wrong |= (tokens >= self.pauses.start) & (tokens < self.pauses.stop)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise DataError(
                f"{path_of(self.prefix, 'bin')}: {unit.place(first)}: expected an id below {self.vocabulary:,} that is "
                f"no pause of the model, got {tokens[first]}"
            )
