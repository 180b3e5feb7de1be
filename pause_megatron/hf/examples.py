"""Finetuning dataset for transformers models: prompt, pauses and target, with loss on the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pause_megatron.config.batching import pause_range
from pause_megatron.data.supervised.examples import Arrangement, Prompting, continuations, encode_examples
from pause_megatron.data.supervised.windows import SupervisedWindows
from pause_megatron.data.tokenizer.backends import backend_of
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import ConfigError
from pause_megatron.hf.loss import IGNORED


@dataclass
class _Example:
    id: str
    prompt: str
    target: str


class PauseExamples(Dataset[dict[str, Tensor]]):
    """Prompt, M pauses, target, end of text; loss only on the target (Goyal et al., ICLR 2024, section 3.2).

    These are the examples of `pause-megatron finetune` in its order, epoch after epoch, one in a sample. Use them with
    `data_collator=pad_batch` and one epoch of `Trainer`, since the dataset contains all epochs: a range of `pauses` is
    drawn again in each. Order and pauses depend only on (seed, task, epoch, example).

    Args:
        examples: Pairs of prompt and target. A blank between them belongs to the target. Text that spells a special
            token stays text.
        tokenizer: The model's fast transformers tokenizer.
        length: Maximum length of a sample, in tokens. A longer prompt is cut on the left; pauses and targets are not.
        pause_ids: The K pause ids, as from `add_pause_token`.
        pauses: Number of pauses, M; or "LOW..HIGH", drawn for each example and epoch.
        location: "append" after the prompt, or "prepend" before it (after a BOS).
        filler: Text of one ordinary token that replaces the pauses, a control; None for pauses.
        epochs: Number of epochs.
        seed: Seed of order and pauses.
        task: Name of the task; other names give other draws.

    Attributes:
        windows: The native windows of the examples.

    Raises:
        ConfigError: An option out of its range, or a filler of several tokens.
        DataError: No examples, one that does not fit (the message names it), or a tokenizer that is not fast.
    """

    def __init__(
        self,
        examples: Iterable[tuple[str, str]],
        tokenizer: Any,
        length: int,
        *,
        pause_ids: range,
        pauses: int | str = 10,
        location: str = "append",
        filler: str | None = None,
        epochs: float = 1,
        seed: int = 1234,
        task: str = "examples",
    ) -> None:
        prompting = Prompting(location=location, filler=filler)
        if tokenizer.eos_token_id is None:
            raise ConfigError("tokenizer: expected an eos_token, which ends a target, got none")
        native = Tokenizer(
            backend_of(tokenizer, type(tokenizer).__name__), eod=tokenizer.eos_token_id, pause_id=pause_ids.start
        )
        native.check_pause_ids(len(pause_ids))
        if prompting.filler is not None:
            pause_ids = range(first := continuations(native).filler_id(prompting.filler), first + 1)
        arrangement = Arrangement(
            sequence_length=length - 1,
            pauses=pause_range(str(pauses)),
            pause_ids=pause_ids,
            location=prompting.location,
            batching="padded",
            leading=len(native.leading),
        )
        named = [_Example(str(number), *pair) for number, pair in enumerate(examples)]
        self.windows = SupervisedWindows(encode_examples(named, native), arrangement, seed=seed, task=task)
        self._length = self.windows.windows_in_epochs(epochs)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Return example `idx` of the epochs.

        Args:
            idx: Number of the example, from 0 on through all epochs.

        Returns:
            input_ids and labels, int64 [seq]; a label is -100 outside the target.

        Raises:
            IndexError: A number past the last example.
        """
        if not 0 <= idx < self._length:
            raise IndexError(f"expected an example from 0 to {self._length - 1}, got {idx}")
        number, within = self.windows.locate(int(idx))
        epoch = self.windows.epoch(number)
        (item,) = epoch.windows[within]
        whole, prefix = self.windows.arrangement.arrange(self.windows.examples[item], int(epoch.counts[item]))
        input_ids = torch.from_numpy(whole)
        labels = input_ids.clone()
        labels[:prefix] = IGNORED
        return {"input_ids": input_ids, "labels": labels}
