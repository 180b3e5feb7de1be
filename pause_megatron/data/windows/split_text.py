"""Check that each corpus has the text of one window in its share of each split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.config.schema import PauseSection
from pause_megatron.data.windows.pause import PausePlan
from pause_megatron.errors import DataError

_CHUNK = 1 << 20  # documents summed at a time

# By the split, and whether it has corpora of its own.
_ADVICE = {
    (Split.train, False): "Leave it out of data.prefix, prepare more text, or give training a larger share",
    (Split.valid, False): "Give validation a larger share with data.split, corpora of its own with data.valid_prefix, "
    "or switch it off with validation.every=0",
    (Split.valid, True): "Give other corpora with data.valid_prefix, or switch validation off with validation.every=0",
}


def require_text(
    train: Sequence[str],
    valid: Sequence[str],
    *,
    split: str,
    sequence_length: int,
    pause: PauseSection,
    validates: bool,
) -> None:
    """Check that every corpus has the text of one window in each split that is built from it.

    megatron-core cannot blend a corpus with less text. A single corpus with less is repeated within one window.

    Args:
        train: Prefixes of the corpora to train on; may be empty.
        valid: Prefixes of the corpora to validate on. Empty: those of `train`.
        split: Shares of the documents of `train`, as in `data.split`.
        sequence_length: N, input tokens of a window, pauses included.
        pause: The pause section. Validation also scores windows without pauses, which take more text.
        validates: Whether a validation split is built.

    Raises:
        DataError: A corpus has less text. The message names the first one.
    """
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    with_pauses = PausePlan.of(pause, sequence_length).text_length
    without_pauses = sequence_length + 1
    for prefix in train:
        _require(prefix, _Share(Split.train, matrix[Split.train.value], split), with_pauses, sequence_length)
    if validates:
        bounds = (0.0, 1.0) if valid else matrix[Split.valid.value]
        share = _Share(Split.valid, bounds, None if valid else split)
        for prefix in valid or train:
            _require(prefix, share, without_pauses, sequence_length)


class _Share(NamedTuple):
    """A split's share of the documents of a corpus."""

    split: Split
    bounds: tuple[float, float] | None  # fractions of the documents; None: no documents
    shares: str | None  # data.split; None where the split has corpora of its own


def _require(prefix: str, share: _Share, needed: int, sequence_length: int) -> None:
    # Read as a file, because an empty .bin cannot be mapped.
    index = IndexedDataset(prefix, mmap=False)  # keep it: the lengths are views of its buffer
    lengths = index.sequence_lengths
    first, last = (round(bound * float(len(lengths))) for bound in share.bounds or (0, 0))  # the builder's rounding
    tokens = _count_tokens(lengths[first:last], needed)
    if tokens < needed:
        documents = f"{last - first:,}"
        if share.shares is not None:
            documents += f" of {len(lengths):,}, with data.split={share.shares}"
        raise DataError(
            f"{prefix}: expected at least {needed:,} tokens (a window of data.sequence_length={sequence_length:,}) in "
            f"its {share.split.name} split, got {tokens:,} (documents: {documents}). "
            f"{_ADVICE[share.split, share.shares is None]}"
        )


def _count_tokens(lengths: np.ndarray, enough: int) -> int:
    """Return the number of tokens in documents, or the first partial sum that is enough."""
    tokens = 0
    for start in range(0, len(lengths), _CHUNK):
        tokens += int(lengths[start : start + _CHUNK].sum(dtype=np.int64))
        if tokens >= enough:
            break
    return tokens
