"""Pause insertion into blocks of token ids: a transform for Hugging Face datasets, and a padding collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pause_megatron.config.pauses import BY_PATTERN, pauses_per_window
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.data.windows.token_texts import token_texts
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.hf.loss import IGNORED

COLUMNS = ("input_ids", "labels", "attention_mask")
_ANY_LENGTH = 2**16


class PauseTransform:
    """Transform that inserts pauses into a block of token ids; positions depend on (seed, dataset, split, number) only.

    `datasets` calls it with a block and its number: `map(transform, with_indices=True)`. The dataset may be in memory,
    on disk, or streamed by one reader. Workers of a DataLoader and ranks of `split_dataset_by_node` each count their
    part of a stream from 0; several workers are refused. It is not a collator, since a collator does not know the
    numbers of its samples: its draws would change with the batch size, the number of workers or a resume. For another
    epoch with other positions, use another seed.

    Args:
        pause_ids: The K pause ids, used in turn within a run of pauses.
        rate: Pauses inserted, as a fraction of the block with its pauses; 0 <= rate < 1.
        window: "exact": the block grows by its pauses and keeps all text (use blocks of `text_length`); "trim": it
            keeps its length, and text that does not fit is cut off (as in the paper).
        placement: A name in `pause_megatron.data.windows.pause.POLICIES`, or 'module:attribute'. Not `scored`, since
            blocks have no side array.
        seed: Seed of the positions.
        dataset: Name of the dataset; other names give other positions.
        split: Name of the split; other names give other positions.
        run: Consecutive pauses at each place.
        pattern: Regular expression of the placements `after` and `before`; None: punctuation.
        tokenizer: The tokenizer, for these two.

    Raises:
        ConfigError: As for PausePlan; `scored`; `after` or `before` without a tokenizer.
    """

    def __init__(
        self,
        pause_ids: range,
        *,
        rate: float = 0.1,
        window: str = "exact",
        placement: str = "uniform",
        seed: int = 1234,
        dataset: str = "blocks",
        split: str = "train",
        run: int = 1,
        pattern: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        if placement == "scored" or (placement in BY_PATTERN and tokenizer is None):
            missing = "another placement, for blocks have no side array" if placement == "scored" else "a tokenizer"
            raise ConfigError(f"PauseTransform: expected {missing}, got placement={placement!r}")
        self._texts = None if tokenizer is None else token_texts(tokenizer)
        self.pause_ids, self._address = pause_ids, (dataset, split)
        # Checked now rather than in the middle of the data. A block's plan is this one with its length.
        self._plan = PausePlan(_ANY_LENGTH, rate, window, placement, seed, run, pattern)

    def text_length(self, length: int) -> int:
        """Return the text tokens of a block that has `length` tokens with its pauses."""
        return replace(self._plan, sequence_length=length - 1).text_length

    def __call__(self, block: Mapping[str, Any], number: int) -> dict[str, list[int]]:
        """Insert the pauses into one block.

        Args:
            block: input_ids; optionally labels (not shifted; default: the input_ids) and an attention_mask, whose zeros
                mark padding, which is removed.
            number: Number of the block in its dataset, 0 or more.

        Returns:
            input_ids, labels and attention_mask (all ones). A label is -100 at a pause and at the first token, which
            is not predicted.

        Raises:
            ConfigError: Called with a batch of blocks, or in one of several workers that share a stream.
            DataError: A pause id in the text, fewer than two tokens, labels or a mask of another length, or another
                column with a value for each token. The message names the block.
        """
        if not isinstance(number, (int, np.integer)):
            raise ConfigError(
                f"PauseTransform: expected one block and its number, got a {type(number).__name__} of numbers: use "
                "map(transform, with_indices=True) without batched=True"
            )
        _refuse_shared_stream()
        text, labels = self._text(block, number)
        plan = replace(self._plan, sequence_length=self._length(text.size) - 1)
        window = PauseInjector(plan, self.pause_ids, *self._address, self._texts)(text, number)
        labels_with_pauses = np.full(window.tokens.size, IGNORED)
        labels_with_pauses[window.is_text] = labels[: window.tokens.size - window.places.size]
        labels_with_pauses[0] = IGNORED
        return {
            "input_ids": window.tokens.tolist(),
            "labels": labels_with_pauses.tolist(),
            "attention_mask": [1] * window.tokens.size,
        }

    def _text(self, block: Mapping[str, Any], number: int) -> tuple[np.ndarray, np.ndarray]:
        """Text ids and labels of a block without its padding, int64 [T] each."""
        size = len(block["input_ids"])
        columns = {name: np.asarray(block[name], dtype=np.int64) for name in COLUMNS if name in block}
        other = [
            name
            for name, value in block.items()
            if name not in COLUMNS and isinstance(value, (Sequence, np.ndarray, Tensor)) and not isinstance(value, str)
            if len(value) == size
        ]
        if other:
            raise DataError(
                f"block {number}: column {other[0]!r}: expected no column besides {', '.join(COLUMNS)} with a value "
                f"for each token, got one of {size} values, which pauses would shift. Remove it with remove_columns"
            )
        for name, values in columns.items():
            if values.shape != (size,):
                raise DataError(
                    f"block {number}: column {name!r}: expected {size} values, as input_ids has, got {values.shape}"
                )
        mask = columns.get("attention_mask", np.ones(size, dtype=np.int64)) != 0
        text = columns["input_ids"][mask]
        labels = columns.get("labels", columns["input_ids"])[mask]
        if text.size < 2:
            raise DataError(
                f"block {number}: expected 2 tokens or more, one of them to predict, got {text.size}. Filter such "
                "blocks out, or join texts before they are cut into blocks"
            )
        for values in (text, labels):
            is_pause = (values >= self.pause_ids.start) & (values < self.pause_ids.stop)
            if is_pause.any():
                raise DataError(
                    f"block {number}: expected text only, got the pause id {values[is_pause][0]}. Text that spells "
                    "<pause> must stay text: tokenize with split_special_tokens=True"
                )
        return text, labels

    def _length(self, text_length: int) -> int:
        """Return the length of a block with its pauses: the smallest number whose plan has this much text."""
        length = text_length
        if self._plan.placement == "every" and self._plan.rate:
            return (text_length - 1) * (self._plan.run + 1) + 1
        if self._plan.window == "exact":
            # One more token adds one text token or none, so a step of the missing number of tokens never overshoots.
            while missing := text_length - length + pauses_per_window(self._plan.rate, length - 1):
                length += missing
        return length


def _refuse_shared_stream() -> None:
    worker = get_worker_info()
    if worker is not None and worker.num_workers > 1 and isinstance(worker.dataset, IterableDataset):
        raise ConfigError(
            f"PauseTransform: expected one worker to read a stream, got num_workers={worker.num_workers}: each counts "
            "its blocks from 0, so blocks of different workers would have the same positions. Use num_workers of 0 or "
            "1, or map a dataset that is not streamed"
        )


def pad_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack samples of different lengths, padded on the right: a `data_collator` for Trainer and DataLoader.

    Args:
        samples: input_ids and labels [seq], lists or tensors; other entries are ignored.

    Returns:
        input_ids (padded with 0), labels (with -100) and attention_mask (with 0), int64 [batch, longest seq].
    """
    size = (len(samples), max(len(sample["input_ids"]) for sample in samples))
    batch = {
        "input_ids": torch.zeros(size, dtype=torch.int64),
        "labels": torch.full(size, IGNORED),
        "attention_mask": torch.zeros(size, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        for name in ("input_ids", "labels"):
            batch[name][row, :length] = torch.as_tensor(sample[name])
        batch["attention_mask"][row, :length] = 1
    return batch
