"""Examples with pauses between prompt and target, as a transformers model is finetuned on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pause_megatron.config.batching import pause_range
from pause_megatron.data.supervised.examples import Arrangement, continuations, encode_examples
from pause_megatron.data.supervised.windows import SupervisedWindows
from pause_megatron.data.tokenizer.backends import backend_of
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.pause import LOCATIONS
from pause_megatron.errors import ConfigError
from pause_megatron.hf.loss import IGNORED


class _Example(NamedTuple):
    id: str
    prompt: str
    target: str


class PauseExamples(Dataset):
    """Prompt, M pauses, target, end of text; loss on the target alone (Goyal et al., ICLR 2024, section 3.2).

    The examples that `pause-megatron finetune` trains on, in its order, epoch after epoch, one in a sample. Use them
    with `data_collator=pad_batch` and one epoch of Trainer's, however many there are in here: `pauses` of a range are
    drawn anew in each. Order and pauses depend on (seed, task, epoch, example) alone.

    Args:
        examples: Pairs of prompt and target. A blank between them belongs to the target. Text that spells a special
            token stays text.
        tokenizer: The model's, of transformers, fast.
        length: Longest sample, in tokens. A prompt that is too long is cut on the left; pauses and targets never are.
        pause_ids: As `add_pause_token` gave them.
        pauses: M; or "LOW..HIGH", drawn for each example and epoch.
        location: "append" behind the prompt, or "prepend" before it (behind a BOS).
        filler: Text of an ordinary token to use in place of the pauses, a control.
        epochs: How often each example comes.
        seed: Of order and pauses.
        task: Name of the task; another draws differently.

    Raises:
        ConfigError: an option out of its range, a filler of several tokens.
        DataError: no examples, one that does not fit (it is named), a tokenizer that is not fast or has no EOS.
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
        if location not in LOCATIONS:
            raise ConfigError(f"location: expected one of {', '.join(LOCATIONS)}, got {location!r}")
        if tokenizer.eos_token_id is None:
            raise ConfigError("tokenizer: expected an eos_token, with which a target ends, got none")
        native = Tokenizer(
            backend_of(tokenizer, type(tokenizer).__name__), eod=tokenizer.eos_token_id, pause_id=pause_ids.start
        )
        native.check_pause_ids(len(pause_ids))
        if filler is not None:
            pause_ids = range(first := continuations(native).filler_id(filler), first + 1)
        arrangement = Arrangement(
            sequence_length=length - 1,
            pauses=pause_range(str(pauses)),
            pause_ids=pause_ids,
            location=location,
            batching="padded",
            leading=len(native.leading),
        )
        named = [_Example(str(number), *pair) for number, pair in enumerate(examples)]
        self._windows = SupervisedWindows(encode_examples(named, native), arrangement, seed=seed, task=task)
        self._length = self._windows.windows_in_epochs(epochs)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Example `idx` of the epochs: input_ids and labels int64 [its length]; a label is -100 outside the target."""
        if not 0 <= idx < self._length:
            raise IndexError(f"example {idx}: expected 0 to {self._length - 1}")
        number, within = self._windows.locate(int(idx))
        epoch = self._windows.epoch(number)
        (item,) = epoch.windows[within]
        whole, prefix = self._windows.arrangement.lay(self._windows.examples[item], int(epoch.counts[item]))
        input_ids = torch.from_numpy(whole)
        labels = input_ids.clone()
        labels[:prefix] = IGNORED
        return {"input_ids": input_ids, "labels": labels}
