"""Whether each corpus has enough text in its share of a split."""

from __future__ import annotations

from collections.abc import Sequence

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

_PIECE = 1 << 20  # documents counted together

# By the split, and whether the corpora are its own.
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
    """Make sure that every corpus has the text of one window in each split that is wanted of it.

    megatron-core cannot blend less; of a single corpus it repeats the text within the window, which is then no text.

    Args:
        train: prefixes to train on; none: nothing is.
        valid: prefixes of their own to validate on; none: those of `train`.
        split: shares of the documents of `train`, as in data.split.
        sequence_length: tokens of a window, pauses included.
        pause: the pause options. Windows to validate on are also made without pauses, which takes more text.
        validates: whether validation is asked for.

    Raises:
        DataError: less; the first such corpus is named.
    """
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    plan = PausePlan(sequence_length, pause.rate, pause.window, pause.placement, pause.seed)
    for prefix in train:
        _require(prefix, Split.train, matrix[Split.train.value], plan.text_length, sequence_length, split)
    if validates:
        for prefix in valid or train:
            bounds = (0.0, 1.0) if valid else matrix[Split.valid.value]
            _require(prefix, Split.valid, bounds, sequence_length + 1, sequence_length, None if valid else split)


def _require(
    prefix: str,
    split: Split,
    bounds: tuple[float, float] | None,
    needed: int,
    sequence_length: int,
    shares: str | None,
) -> None:
    # Read by file: an empty .bin cannot be mapped.
    index = IndexedDataset(prefix, mmap=False)  # takes the lengths with it when it goes
    lengths = index.sequence_lengths
    first, last = (round(bound * float(len(lengths))) for bound in bounds or (0, 0))  # the builder's own rounding
    found = _tokens(lengths[first:last], needed)
    if found < needed:
        share = "" if shares is None else f" of {len(lengths):,}, with data.split={shares}"
        advice = _ADVICE[split, shares is None]
        raise DataError(
            f"{prefix}: expected at least {needed:,} tokens (a window of data.sequence_length={sequence_length:,}) in "
            f"its {split.name} split, got {found:,} (documents: {last - first:,}{share}). {advice}"
        )


def _tokens(lengths: np.ndarray, enough: int) -> int:
    """Tokens of documents, counted until they are enough."""
    found = 0
    for start in range(0, len(lengths), _PIECE):
        found += int(lengths[start : start + _PIECE].sum(dtype=np.int64))
        if found >= enough:
            break
    return found
