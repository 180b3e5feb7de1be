"""The documents of a corpus window, by megatron-core's indices, and the side values of its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split

from pause_megatron.data.corpus.side import open_side, side_path
from pause_megatron.errors import DataError


class Piece(NamedTuple):
    """The tokens of one document in a window.

    Attributes:
        document: Number of the document in the corpus.
        offset: Offset of its first token of the window, in the document.
        length: Number of its tokens in the window.
    """

    document: int
    offset: int
    length: int


def pieces_of(dataset: GPTDataset, sample: int) -> list[Piece]:
    """Return the pieces of a window's text, in order; those of padding and of empty documents are left out.

    megatron-core has them since 0.19 only, and without the documents' numbers and offsets.

    Args:
        dataset: The dataset; one of its windows was read before, so that its indices are there.
        sample: Sample number.
    """
    row = int(dataset.shuffle_index[sample])
    (first, begin), (last, end) = dataset.sample_index[row], dataset.sample_index[row + 1]
    lengths = dataset.dataset.sequence_lengths
    pieces = []
    for place in range(int(first), int(last) + 1):
        document = int(dataset.document_index[place])
        start = int(begin) if place == first else 0
        stop = int(end) + 1 if place == last else int(lengths[document])  # windows overlap by a token
        if stop > start:
            pieces.append(Piece(document, start, stop - start))
    return pieces


def document_offsets(pieces: list[Piece]) -> np.ndarray:
    """Return the offsets in a window at which its documents begin, int64: 0 first, ascending."""
    return np.cumsum([0, *(piece.length for piece in pieces[:-1])])


class SideValues:
    """A side array of a corpus, by documents.

    Args:
        dataset: A dataset of the corpus.
        prefix: Prefix of the corpus.
        name: `data.side`.

    Raises:
        DataError: As `open_side`.
    """

    def __init__(self, dataset: GPTDataset, prefix: str, name: str) -> None:
        self.path = side_path(prefix, name)
        self._prefix, self._name, self._corpus = prefix, name, dataset.dataset
        self._values = open_side(prefix, name)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as the whole array, for each worker of a DataLoader.
        return {name: value for name, value in self.__dict__.items() if name != "_values"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._values = open_side(self._prefix, self._name)

    def of(self, pieces: list[Piece], size: int) -> np.ndarray:
        """Return the values of a window's text tokens, nan at padding, read-only [size].

        They are float32, or float64 where float32 would round values of the array (int32, int64, float64).
        """
        values = np.full(size, np.nan, dtype=np.result_type(self._values.dtype, np.float32))
        index, at = self._corpus.index, 0
        itemsize = np.dtype(index.dtype).itemsize
        for document, offset, length in pieces:
            start = int(index.sequence_pointers[document]) // itemsize + offset
            values[at : at + length] = self._values[start : start + length]
            at += length
        values.flags.writeable = False  # the policy sees them before the weights are made of them
        return values

    def weights(
        self, side: np.ndarray, is_text: np.ndarray, loss_mask: np.ndarray, *, sample: int, split: Split
    ) -> np.ndarray:
        """Return the weights of the labels of a window: the values of their tokens; 0 where there is no target.

        Args:
            side: Values of the text tokens [T].
            is_text: Mask of the window's text tokens, bool [N + 1].
            loss_mask: 1 at targets, float32 [N].
            sample: Sample number, for the message.
            split: The split, likewise.

        Returns:
            Weights aligned with the labels, float32 [N].

        Raises:
            DataError: The value of a target is negative or not finite.
        """
        values = np.zeros(is_text.size, dtype=np.float32)
        values[is_text] = side[: np.count_nonzero(is_text)]
        weights = np.where(loss_mask > 0, values[1:], np.float32(0))
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            raise DataError(
                f"{self.path}: expected values of 0 or more, as objective.token_weights=side takes them for weights, "
                f"got {weights[wrong][0]} for a target of sample {sample} ({split.name})"
            )
        return weights
