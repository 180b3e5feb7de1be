"""Whether each corpus has enough text in its share of a split."""

from __future__ import annotations

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.data.dataset import PauseGPTDatasetConfig
from pause_megatron.errors import DataError

_PIECE = 1 << 20  # documents counted together


def require_window(config: PauseGPTDatasetConfig, split: Split, *, of_its_own: bool = False) -> None:
    """Make sure that every corpus of a blend has the text of one window in a split.

    megatron-core cannot blend less; of a single corpus it repeats the text within the window, which is then no text.

    Args:
        config: of the windows; those without pauses take the most text.
        split: train or valid.
        of_its_own: whether the corpora are data.valid_prefix.

    Raises:
        DataError: less; the first such corpus is named.
    """
    needed = config.pause_plan.text_length
    for prefix in config.blend[0]:
        # Read by file: an empty .bin cannot be mapped. The rounding is the builder's own.
        index = IndexedDataset(prefix, mmap=False)  # takes the lengths with it when it goes
        lengths = index.sequence_lengths
        first, last = (round(bound * float(len(lengths))) for bound in config.split_matrix[split.value] or (0, 0))
        found = _tokens(lengths[first:last], needed)
        if found < needed:
            share = "" if of_its_own else f" of {len(lengths):,}, with data.split={config.split}"
            raise DataError(
                f"{prefix}: expected at least {needed:,} tokens (a window of data.sequence_length="
                f"{config.sequence_length:,}) in its {split.name} split, got {found:,} (documents: {last - first:,}"
                f"{share}). {_advice(split, of_its_own)}"
            )


def _tokens(lengths: np.ndarray, enough: int) -> int:
    """Tokens of documents, counted until they are enough."""
    found = 0
    for start in range(0, len(lengths), _PIECE):
        found += int(lengths[start : start + _PIECE].sum(dtype=np.int64))
        if found >= enough:
            break
    return found


def _advice(split: Split, of_its_own: bool) -> str:
    if split is Split.train:
        return "Leave it out of data.prefix, prepare more text, or give training a larger share"
    other = "other corpora with data.valid_prefix"
    if of_its_own:
        return f"Give {other}, or none to be scored with validation.every=0"
    return f"Give validation a larger share with data.split, {other}, or switch it off with validation.every=0"
