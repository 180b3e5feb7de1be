"""Pretraining datasets for transformers models: windows of a prepared corpus with pauses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

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


class LabelledWindows(Dataset[dict[str, Tensor]]):
    """A PauseGPTDataset or BlendedDataset with labels in Hugging Face's convention: the model shifts them itself.

    A sample has input_ids and labels of the whole window, int64 [N + 1], since the target of its last position is one
    of its tokens. A label is the token at its own position. It is -100 at pauses, at padding and at the first token, so
    the number of other labels is the number of targets, as `Trainer` counts them.

    With intra-document masking, position_ids int64 [N + 1] start again with each document. transformers derives the
    mask from them, but only without an attention_mask, which a sample therefore lacks, and without a KV cache.
    `Trainer` disables the cache; other loops must pass use_cache=False.

    Args:
        windows: Maps a sample number to tokens, labels, loss_mask and position_ids [N].
        pause_ids: The K pause ids.
        positions: Whether samples have position_ids.
        samples: Number of windows to use, from the first on; None for all. megatron-core builds whole epochs, so it may
            have more.
    """

    def __init__(self, windows: Samples, pause_ids: range, *, positions: bool, samples: int | None = None) -> None:
        self.windows, self.pause_ids, self.positions = windows, pause_ids, positions
        self._length = len(windows) if samples is None else min(samples, len(windows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Return window `idx`.

        Args:
            idx: Number of the window, 0 or more.

        Returns:
            input_ids, labels and, if asked for, position_ids, int64 [N + 1].

        Raises:
            IndexError: A number past the last window.
        """
        if not 0 <= idx < self._length:
            raise IndexError(f"expected a window from 0 to {self._length - 1}, got {idx}")
        sample = self.windows[int(idx)]
        tokens, following = sample["tokens"], sample["labels"]
        labels = following.masked_fill(sample["loss_mask"] == 0, IGNORED)
        last = following[-1:]
        if labels[-1] == IGNORED and last == 0:  # a pause, which has no label (or padding, which is ignored)
            turn = (int(tokens[-1]) - self.pause_ids.start + 1) if int(tokens[-1]) in self.pause_ids else 0
            last = last + self.pause_ids[turn % len(self.pause_ids)]
        result = {"input_ids": torch.cat([tokens, last]), "labels": torch.cat([last.new_tensor([IGNORED]), labels])}
        if self.positions:
            positions = sample["position_ids"]
            result["position_ids"] = torch.cat([positions, positions[-1:] + 1])
        return result


class PauseWindows(NamedTuple):
    """Datasets for training and validation.

    Attributes:
        train: Windows with pauses.
        valid: Held-out windows with pauses; None if none were requested, or the split has no documents.
        valid_without_pauses: Held-out windows of the same length without pauses, or None likewise.
        pause_ids: The K pause ids.
        rows: Vocabulary rows that the model needs, pauses included.
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
    window: Literal["exact", "trim"] = "exact",
    placement: str = "uniform",
    pause_seed: int = 1234,
    seed: int = 1234,
    intra_document_masking: bool = False,
    eod_mask_loss: bool = False,
    cache: str | None = None,
    documents: str | None = None,
    run: int = 1,
    pattern: str | None = None,
    side: str | None = None,
) -> PauseWindows:
    """Open prepared corpora as datasets for Trainer, accelerate or a plain loop.

    They are the windows that `pause-megatron pretrain` trains on with data.sequence_length = length - 1, in the order
    of `seed`. Request as many as the whole run reads: a repeated corpus then has other pauses each time, unlike several
    epochs over `train`.

    Args:
        prefix: Prefix of a prepared corpus; or several, or a blend WEIGHT PREFIX WEIGHT PREFIX ...
        length: Tokens of a window, pauses included: length - 1 of them are predicted or pauses.
        pause_ids: The model's K pause ids, as from `add_pause_token`.
        samples: Number of training windows; None for one pass over the corpora.
        valid_samples: Number of held-out windows; 0 for none.
        valid_prefix: Corpora for validation; all of `prefix` is then used for training.
        split: Shares of the documents for train, validation and test; None for the default of data.split.
        rate: As pause.rate.
        window: As pause.window.
        placement: As pause.placement.
        pause_seed: As pause.seed.
        seed: Seed of the order of the windows.
        intra_document_masking: Whether positions start again with each document (see LabelledWindows).
        eod_mask_loss: Whether the token after an end of document is no target.
        cache: Folder of the index caches; None for 'cache' beside the first prefix.
        documents: Deprecated: "apart" is intra_document_masking=True, "joined" is False.
        run: As pause.run.
        pattern: As pause.pattern.
        side: As data.side, for placement="scored" or a policy of yours. Samples have no weights from it.

    Raises:
        ConfigError: Options that do not fit, pause ids that differ from the corpus's, a weighted blend without
            `samples`, or several processes without a process group.
        DataError: A corpus that is missing, incomplete, or prepared with another tokenizer than the others.
    """
    _check_connected()
    if documents is not None:
        if documents not in ("joined", "apart"):
            raise ConfigError(f"documents: expected 'joined' or 'apart', got {documents!r}")
        if intra_document_masking:
            raise ConfigError("expected intra_document_masking or its old name documents, got both")
        intra_document_masking = documents == "apart"
        warnings.warn(
            f"documents={documents!r} is deprecated; write intra_document_masking={intra_document_masking}",
            FutureWarning,
            stacklevel=2,
        )
    PausePlan(length - 1, rate, window, placement, pause_seed, run, pattern)  # raises where they do not fit
    if side is not None and placement != "scored" and ":" not in placement:
        raise ConfigError(f"side: expected placement='scored' or a policy of yours with it, got {placement!r}")
    data = DataSection(prefix=_words(prefix), valid_prefix=_words(valid_prefix))
    pause = PauseSection(
        rate=rate,
        window=window,
        placement=placement,
        run=run,
        pattern=pattern,
        seed=pause_seed,
        embeddings=len(pause_ids) or 1,
    )
    tokenizer = open_corpora(data, pause.embeddings).tokenizer
    if pause_ids.start != tokenizer.pause_id or not len(pause_ids):
        raise ConfigError(
            f"pause_ids: expected ids from {tokenizer.pause_id} on, which the corpus {data.prefix[-1]} reserves for "
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
            side=side,
            intra_document_masking=intra_document_masking,
            eod_mask_loss=eod_mask_loss,
        )
    )
    if built.train is None:
        raise ConfigError(f"prefix: expected corpora to train on, got {prefix!r}")

    def labelled(windows: Samples, count: int | None) -> LabelledWindows:
        return LabelledWindows(windows, pause_ids, positions=intra_document_masking, samples=count)

    return PauseWindows(
        labelled(built.train, samples),
        None if built.valid is None else labelled(built.valid, valid_samples),
        None if built.valid_without_pauses is None else labelled(built.valid_without_pauses, valid_samples),
        pause_ids,
        built.tokenizer.vocab_size,
    )


def _words(prefix: str | Path | Sequence[str]) -> tuple[str, ...]:
    if isinstance(prefix, Path):
        return (str(prefix),)
    return tuple(prefix.split()) if isinstance(prefix, str) else tuple(map(str, prefix))


def _check_connected() -> None:
    """Check for a process group. Without one, every process would build and write the same index caches."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        raise ConfigError(
            "pause_windows: expected a process group where WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}, so that one rank builds the index caches, got none: make the "
            "TrainingArguments or the Accelerator first"
        )
