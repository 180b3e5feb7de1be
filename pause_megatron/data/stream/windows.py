"""Windows cut from documents while they are read, and the dataset that puts pauses into them.

The documents are concatenated, each with its EOD. Window i holds the tokens from i * (T - 1) to i * (T - 1) + T. These
are the windows that GPTDataset cuts, unshuffled, from a corpus of the same documents in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pause_megatron.data.stream.documents import Documents, ReaderState
from pause_megatron.data.text.documents import Tally
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.boundaries import document_begins, restarting_positions, segments_of, shared_positions
from pause_megatron.data.windows.pause import PauseInjector
from pause_megatron.data.windows.targets import supervise
from pause_megatron.errors import DataError

BATCH_DOCUMENTS = 64
"""Documents that are tokenized together."""


@dataclass(frozen=True)
class StreamPosition:
    """A position between two documents of a stream, from which reading can resume. `stream.json` of a checkpoint.

    Attributes:
        token: Number of tokens before it, since the beginning of the run.
        reader: State of the reader of documents there. None: the first document.
    """

    token: int
    reader: ReaderState | None


class WindowSource(Protocol):
    """A source of text windows. Windows are requested in ascending order."""

    def text(self, sample: int) -> np.ndarray:
        """Return the text of a window, int64 [T].

        Args:
            sample: Number of the window in the run.

        Raises:
            DataError: The text cannot be read.
        """
        ...


class TextWindows:
    """The text windows of a stream of documents. Each is read once, in order.

    Args:
        open_documents: Opens the reader of documents at a state; None: at the first document.
        tokenizer: The tokenizer of the run. Its EOD ends each document.
        text_length: T, text tokens of a window.
        position: The position to resume from. None: the first document.
    """

    def __init__(
        self,
        open_documents: Callable[[ReaderState | None], Documents],
        tokenizer: Tokenizer,
        text_length: int,
        position: StreamPosition | None = None,
    ) -> None:
        position = position or StreamPosition(0, None)
        self._documents = open_documents(position.reader)
        self._tokenizer = tokenizer
        self._text_length = text_length
        self._tokens = np.zeros(0, dtype=np.int32)
        self._first = position.token  # number of self._tokens[0] in the stream
        self._positions: deque[StreamPosition] = deque()

    @property
    def malformed(self) -> Tally:
        """Counts of the records that the reader has skipped since it was opened."""
        return self._documents.malformed

    def text(self, sample: int) -> np.ndarray:
        """Return the text of a window, int64 [T].

        Args:
            sample: Number of the window in the run.

        Raises:
            DataError: The documents cannot be read, one encodes to the pause id, or the window has been dropped.
        """
        start = self._start(sample)
        if start < self._first:
            raise DataError(
                f"data.source: expected a request for text from token {self._first:,} of the stream on, got one for "
                f"window {sample}, which begins at token {start:,} and has been dropped"
            )
        while self._first + self._tokens.size < start + self._text_length:
            self._read()
        start -= self._first
        return self._tokens[start : start + self._text_length].astype(np.int64)

    def position(self, sample: int) -> StreamPosition:
        """Return the last retained position at or before the beginning of a window.

        Args:
            sample: Number of the window in the run.

        Raises:
            DataError: No such position is retained.
        """
        start = self._start(sample)
        before = [position for position in self._positions if position.token <= start]
        if not before:
            raise DataError(f"data.source: expected a retained position at or before window {sample}, got none")
        return before[-1]

    def forget(self, sample: int, position_sample: int) -> None:
        """Drop text and positions that will not be requested again.

        Args:
            sample: The first window whose text may still be requested.
            position_sample: The first window whose position may still be requested.
        """
        drop = self._start(sample) - self._first
        if drop > self._tokens.size // 2:  # seldom, because it copies
            drop = min(drop, self._tokens.size)
            self._tokens, self._first = self._tokens[drop:].copy(), self._first + drop
        start = self._start(position_sample)
        while len(self._positions) > 1 and self._positions[1].token <= start:
            self._positions.popleft()

    def _start(self, sample: int) -> int:
        """Return the number of a window's first token in the stream: each window overlaps the next by one token."""
        return sample * (self._text_length - 1)

    def _read(self) -> None:
        """Read and tokenize the next documents."""
        self._positions.append(StreamPosition(self._first + self._tokens.size, self._documents.state()))
        batch = self._tokenizer.encode_batch(self._documents.take(BATCH_DOCUMENTS))
        ids = [token for document in batch for token in (*document, self._tokenizer.eod)]
        new = np.array(ids, dtype=np.int32)
        if (new == self._tokenizer.pause_id).any():
            raise DataError(
                f"data.source: expected text ids only, got the pause id {self._tokenizer.pause_id} in a document. "
                "Reserve another pause id in the tokenizer"
            )
        self._tokens = np.concatenate([self._tokens, new])


class StreamDataset:
    """A map-style dataset of streamed windows with pauses. Its samples are those of PauseGPTDataset.

    Args:
        windows: The source of text windows.
        injector: The pauses, by sample number.
        samples: Number of windows that the run needs.
        eod: The id that ends a document.
        intra_document_masking: Whether positions restart with each document, and samples have `segments`.
        eod_mask_loss: Whether the first token of a document is no target.
        shared_positions: Whether a pause has the position of the text token before it.
    """

    def __init__(
        self,
        windows: WindowSource,
        injector: PauseInjector,
        samples: int,
        *,
        eod: int,
        intra_document_masking: bool = False,
        eod_mask_loss: bool = False,
        shared_positions: bool = False,
    ) -> None:
        self._windows, self._injector, self._samples = windows, injector, samples
        self._eod, self._intra_document_masking, self._eod_mask_loss = eod, intra_document_masking, eod_mask_loss
        self._shared_positions = shared_positions
        self._position_ids = torch.arange(injector.plan.sequence_length)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        text = self._windows.text(idx)
        documents = None
        if self._injector.sees_windows:
            documents = np.concatenate([[0], np.flatnonzero(text[:-1] == self._eod) + 1])
        window = self._injector(text, idx, documents=documents)
        begins = document_begins(window, self._eod) if self._intra_document_masking or self._eod_mask_loss else None
        targets = supervise(window, begins if self._eod_mask_loss else None)
        sample = {
            "tokens": torch.from_numpy(window.tokens[:-1]),
            "labels": torch.from_numpy(targets.labels),
            "loss_mask": torch.from_numpy(targets.loss_mask),
            "position_ids": self._position_ids,
        }
        resets = begins[:-1] if self._intra_document_masking and begins is not None else None
        if resets is not None:
            sample["position_ids"] = restarting_positions(resets)
            sample["segments"] = segments_of(sample["position_ids"])
        if self._shared_positions:
            sample["position_ids"] = shared_positions(window.is_text[:-1], resets)
        return sample
