"""Windows of a prepared corpus with their pauses, as a transformers model reads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pause_megatron.config.schema import DataSection, PauseSection
from pause_megatron.data.batches.loader import Samples
from pause_megatron.data.corpus.corpora import open_corpora
from pause_megatron.data.windows.build import DatasetOptions, build_datasets
from pause_megatron.data.windows.pause import PausePlan
from pause_megatron.errors import ConfigError
from pause_megatron.hf.loss import IGNORED


class LabelledWindows(Dataset):
    """A PauseGPTDataset or BlendedDataset in Hugging Face's convention: the model shifts the labels itself.

    A sample has input_ids and labels int64 [N + 1], the whole window, since the target of its last position is a token
    of it. A label is the token at its own place, and -100 where nothing is to be predicted: at pauses, at padding, at
    the first token. So the number of labels is the number of targets, as Trainer counts them. Where documents are
    apart, position_ids int64 [N + 1] start again with each. From these transformers keeps packed sequences from seeing
    each other, but only without an attention_mask, which a sample therefore does not have, and without a cache: Trainer
    switches it off, a loop of your own must say use_cache=False.

    Args:
        windows: Sample number -> tokens, labels, loss_mask and position_ids [N].
        pause_ids: The K pause ids.
        positions: Whether to give position_ids.
        samples: Windows to give, the first ones; None: all. (megatron-core begins whole epochs, and so has more.)
    """

    def __init__(self, windows: Samples, pause_ids: range, *, positions: bool, samples: int | None = None) -> None:
        self.windows, self.pause_ids, self.positions = windows, pause_ids, positions
        self._length = len(windows) if samples is None else min(samples, len(windows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Window `idx`, 0 or more. Raises IndexError behind the last."""
        if not 0 <= idx < self._length:
            raise IndexError(f"window {idx}: expected 0 to {self._length - 1}")
        sample = self.windows[int(idx)]
        tokens, following = sample["tokens"], sample["labels"]
        labels = following.masked_fill(sample["loss_mask"] == 0, IGNORED)
        last = following[-1:]
        if labels[-1] == IGNORED and last == 0:  # a pause, which has no label. (Or padding: nothing reads it.)
            turn = (int(tokens[-1]) - self.pause_ids.start + 1) if int(tokens[-1]) in self.pause_ids else 0
            last = last + self.pause_ids[turn % len(self.pause_ids)]
        made = {"input_ids": torch.cat([tokens, last]), "labels": torch.cat([last.new_tensor([IGNORED]), labels])}
        if self.positions:
            positions = sample["position_ids"]
            made["position_ids"] = torch.cat([positions, positions[-1:] + 1])
        return made


class PauseWindows(NamedTuple):
    """What to train and to validate on.

    Attributes:
        train: Windows with pauses.
        valid: Held-out windows with pauses; None where none were asked for, or the split has no documents.
        valid_without_pauses: Held-out windows of the same length without pauses, or None likewise.
        pause_ids: The K pause ids.
        rows: Ids that the model needs rows for, pauses included.
    """

    train: LabelledWindows
    valid: LabelledWindows | None
    valid_without_pauses: LabelledWindows | None
    pause_ids: range
    rows: int


def pause_windows(
    prefix: str | Path | Sequence[str],
    length: int,
    *,
    pause_ids: range,
    samples: int | None = None,
    valid_samples: int = 0,
    valid_prefix: str | Path | Sequence[str] = (),
    split: str | None = None,
    rate: float = 0.1,
    window: str = "exact",
    placement: str = "uniform",
    pause_seed: int = 1234,
    seed: int = 1234,
    intra_document_masking: bool = False,
    eod_mask_loss: bool = False,
    cache: str | None = None,
    documents: str | None = None,
) -> PauseWindows:
    """Open prepared corpora as datasets for Trainer, accelerate or a plain loop.

    They are the windows that `pause-megatron pretrain` trains on with data.sequence_length = length - 1, in the order
    of `seed`. Ask for as many as the whole run reads: a corpus that is repeated then has other pauses each time, which
    several epochs over `train` would not have.

    Args:
        prefix: Prefix of a corpus that `prepare` made; or several, or a blend WEIGHT PREFIX WEIGHT PREFIX ...
        length: Tokens of a window, pauses included: length - 1 of them are predicted or pauses.
        pause_ids: Of the model, as `add_pause_token` gave them.
        samples: Windows to train on; None: one pass over the corpora.
        valid_samples: Held-out windows; 0: none.
        valid_prefix: Corpora to validate on, which leaves all of `prefix` for training.
        split: Shares of the documents for train, validation, test; default as for data.split.
        rate, window, placement, pause_seed: As pause.rate, pause.window, pause.placement, pause.seed.
        seed: Of the order of the windows.
        intra_document_masking: Start positions again with each document (see LabelledWindows).
        eod_mask_loss: No target behind an end of document.
        cache: Folder of the index caches; default: 'cache' beside the first prefix.
        documents: Deprecated: "apart" is intra_document_masking=True, "joined" is False.

    Raises:
        ConfigError: options that do not fit, pause ids that are not the corpus's, a blend with weights but without
            `samples`, or several processes that are not connected yet.
        DataError: a corpus that is missing, unfinished, or prepared with another tokenizer than the others.
    """
    _check_connected()
    if documents is not None:
        if documents not in ("joined", "apart"):
            raise ConfigError(f"documents: expected 'joined' or 'apart', got {documents!r}")
        intra_document_masking = documents == "apart"
        warnings.warn(
            f"documents={documents!r} is deprecated; write intra_document_masking={intra_document_masking}",
            DeprecationWarning,
            stacklevel=2,
        )
    PausePlan(length - 1, rate, window, placement, pause_seed)  # refuses what does not fit
    data = DataSection(prefix=_words(prefix), valid_prefix=_words(valid_prefix))
    pause = PauseSection(rate=rate, window=window, placement=placement, seed=pause_seed, embeddings=len(pause_ids) or 1)
    tokenizer = open_corpora(data, pause.embeddings).tokenizer
    if pause_ids.start != tokenizer.pause_id or not len(pause_ids):
        raise ConfigError(
            f"pause_ids: expected ids from {tokenizer.pause_id} on, which the corpus {data.prefix[-1]} keeps for "
            f"pauses (its tokenizer has {tokenizer.vocab_size} ids), got {pause_ids}. Prepare the corpus with the "
            "model's tokenizer: save it after add_pause_token, and pause-megatron prepare --tokenizer FOLDER"
        )
    built = build_datasets(
        DatasetOptions(
            data.prefix,
            valid_prefix=data.valid_prefix,
            split=split or ("1,0,0" if data.valid_prefix else "99,1,0"),
            sequence_length=length - 1,
            tokenizer=tokenizer,
            pause=pause,
            seed=seed,
            train_samples=samples,
            valid_samples=valid_samples,
            cache=cache,
            intra_document_masking=intra_document_masking,
            eod_mask_loss=eod_mask_loss,
        )
    )
    train, valid, plain = (
        None if part is None else LabelledWindows(part, pause_ids, positions=intra_document_masking, samples=number)
        for part, number in (
            (built.train, samples),
            (built.valid, valid_samples),
            (built.valid_without_pauses, valid_samples),
        )
    )
    return PauseWindows(train, valid, plain, pause_ids, built.tokenizer.vocab_size)


def _words(prefix: str | Path | Sequence[str]) -> str | tuple[str, ...]:
    return str(prefix) if isinstance(prefix, (str, Path)) else tuple(map(str, prefix))


def _check_connected() -> None:
    """Each process that is alone builds the index caches, and several would write the same files at once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        raise ConfigError(
            "pause_windows: expected a process group where WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}, so that one rank builds the index caches, got none: make the "
            "TrainingArguments or the Accelerator first"
        )
