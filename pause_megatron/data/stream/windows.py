"""Windows cut from documents as they are read, for a run without a prepared corpus.

The documents stand one behind the other, each with its EOD, and window i holds the tokens from i * (T - 1) to
i * (T - 1) + T: what GPTDataset cuts from a corpus of these documents in this order, unshuffled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pause_megatron.data.stream.documents import Documents
from pause_megatron.data.text.documents import Tally
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.boundaries import document_begins, restarting_positions, segments_of
from pause_megatron.data.windows.pause import PauseInjector
from pause_megatron.errors import DataError

BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Place:
    """A point between two documents of a stream, from which it can be read again.

    Attributes:
        token: tokens before it, since the beginning of the run.
        reader: the state of the documents' reader there; plain values.
    """

    token: int
    reader: dict[str, Any] | None


class Windows(Protocol):
    """Whoever gives the text of window `sample`: int64 [T]. To be asked for in ascending order."""

    def text(self, sample: int) -> np.ndarray: ...


class TextWindows:
    """The windows of a stream of documents, each read once, in order.

    Args:
        open_documents: state of a reader (None: the beginning) -> documents from there on.
        tokenizer: its EOD ends each document.
        text_length: T, text tokens of a window.
        place: where to begin reading; default: at the first document.
    """

    def __init__(
        self,
        open_documents: Callable[[dict[str, Any] | None], Documents],
        tokenizer: Tokenizer,
        text_length: int,
        place: Place | None = None,
    ) -> None:
        place = place or Place(0, None)
        self._documents = open_documents(place.reader)
        self._tokenizer = tokenizer
        self._text_length = text_length
        self._tokens = np.zeros(0, dtype=np.int32)
        self._first = place.token  # the number of self._tokens[0]
        self._places: deque[Place] = deque()

    @property
    def malformed(self) -> Tally:
        """What the reader has left out since it was opened."""
        return self._documents.malformed

    def text(self, sample: int) -> np.ndarray:
        """The text of a window: int64 [T].

        Raises:
            DataError: the documents cannot be read; a document that encodes to the pause id.
        """
        start = sample * (self._text_length - 1)
        if start < self._first:
            raise DataError(f"window {sample} was asked for, but the stream has gone on from it")
        while self._first + self._tokens.size < start + self._text_length:
            self._read()
        start -= self._first
        return self._tokens[start : start + self._text_length].astype(np.int64)

    def place(self, sample: int) -> Place:
        """The last place at or before the beginning of a window."""
        start = sample * (self._text_length - 1)
        found = [place for place in self._places if place.token <= start]
        if not found:
            raise DataError(f"no place in the stream before window {sample} is remembered")
        return found[-1]

    def forget(self, sample: int, place_sample: int) -> None:
        """Windows before `sample`, and places before `place_sample`'s, will not be asked for again."""
        drop = sample * (self._text_length - 1) - self._first
        if drop > self._tokens.size // 2:  # seldom: it copies
            drop = min(drop, self._tokens.size)
            self._tokens, self._first = self._tokens[drop:].copy(), self._first + drop
        start = place_sample * (self._text_length - 1)
        while len(self._places) > 1 and self._places[1].token <= start:
            self._places.popleft()

    def _read(self) -> None:
        self._places.append(Place(self._first + self._tokens.size, self._documents.state()))
        batch = self._tokenizer.encode_batch(self._documents.take(BATCH_DOCUMENTS))
        ids = [token for document in batch for token in (*document, self._tokenizer.eod)]
        new = np.array(ids, dtype=np.int32)
        if (new == self._tokenizer.pause_id).any():
            raise DataError(f"a document encodes to the pause id {self._tokenizer.pause_id}; reserve another one")
        self._tokens = np.concatenate([self._tokens, new])


class StreamDataset:
    """Sample number -> window with pauses, as PauseGPTDataset gives it.

    Args:
        windows: texts by sample number.
        injector: pauses by sample number.
        samples: windows that the run needs.
        eod: the id that ends a document.
        intra_document_masking, eod_mask_loss: as in build_datasets.
    """

    def __init__(
        self,
        windows: Windows,
        injector: PauseInjector,
        samples: int,
        *,
        eod: int,
        intra_document_masking: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        self._windows, self._injector, self._samples = windows, injector, samples
        self._eod, self._apart, self._eod_mask_loss = eod, intra_document_masking, eod_mask_loss
        self._position_ids = torch.arange(injector.plan.sequence_length)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        window = self._injector(self._windows.text(idx), idx)
        before_pause = window.places - 1
        labels = window.tokens[1:].copy()
        labels[before_pause] = 0
        loss_mask = np.ones(labels.size, dtype=np.float32)
        loss_mask[before_pause] = 0
        sample = {
            "tokens": torch.from_numpy(window.tokens[:-1]),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": self._position_ids,
        }
        if self._apart or self._eod_mask_loss:
            begins = document_begins(window, self._eod)
            if self._eod_mask_loss:
                loss_mask[begins[1:]] = 0
            if self._apart:
                sample["position_ids"] = restarting_positions(begins[:-1])
                sample["segments"] = segments_of(sample["position_ids"])
        return sample
