"""The datasets of a pretraining run: train and validation splits, by megatron-core's BlendedMegatronDatasetBuilder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.config.blend import Blend, is_number, parse_blend
from pause_megatron.config.schema import PauseSection
from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseGPTDatasetConfig, PauseTokenizer
from pause_megatron.data.windows.extension import TooFewWindows, TrainWindows, corpora_of, train_windows
from pause_megatron.data.windows.index_cache import IndexCacheError, cached_indices, unused_files
from pause_megatron.data.windows.split_text import require_text
from pause_megatron.errors import ConfigError, DataError

log = logging.getLogger(__name__)

HeldOutWindows: TypeAlias = PauseGPTDataset | BlendedDataset


@dataclass(frozen=True)
class DatasetOptions:
    """The corpora, windows and sizes of a run's datasets.

    The number of samples is part of megatron-core's cache key. It decides how often the documents are shuffled, and in
    which order. Give the number that the whole run needs (steps * global batch), and the same at every start.

    Attributes:
        prefix: Prefixes of prepared corpora: one; several, which are read once each; or a blend
            (WEIGHT, PREFIX, WEIGHT, PREFIX, ...) as in Megatron-LM's --data-path, repeated as often as needed. Empty:
            there is no train split.
        valid_prefix: Corpora to validate on, in the same forms. With them, `split` must give all of `prefix` to
            training.
        split: Shares of the documents for train, validation and test, such as "99,1,0".
        sequence_length: N, input tokens of a window, pauses included.
        tokenizer: The tokenizer of the corpora, with the attributes that PauseTokenizer names.
        pause: The pause section of the configuration.
        seed: Seed of the sample order.
        train_samples: Windows that the whole run trains on. None: those of one epoch over the corpora.
        valid_samples: Windows of one validation. 0: no validation.
        cache: Folder of the index caches. None: `cache` beside the first prefix.
        intra_document_masking: Whether positions restart with each document, and samples have `segments`.
        eod_mask_loss: Whether the first token of a document is no target, as in Megatron-LM.
        read_cache: Whether to compare index caches with their digests even if they are unchanged since.
        samples_before: Windows that a finished run was given, which this run extends (`data.windows.extension`).
        side: Name of a side array that every corpus has, for policies that use it and for `side_weights`.
        side_weights: Whether samples have `weights`: the side values of their labels.
    """

    prefix: Sequence[str]
    _: KW_ONLY
    valid_prefix: Sequence[str] = ()
    split: str
    sequence_length: int
    tokenizer: object
    pause: PauseSection
    seed: int
    train_samples: int | None
    valid_samples: int
    cache: str | None = None
    intra_document_masking: bool = False
    eod_mask_loss: bool = False
    read_cache: bool = False
    samples_before: int = 0
    side: str | None = None
    side_weights: bool = False


@dataclass(frozen=True)
class Datasets:
    """The datasets of a pretraining run.

    Attributes:
        train: Train windows, at least as many as were asked for. None without corpora to train on.
        valid: Held-out windows with pauses. None without validation.
        valid_without_pauses: Held-out windows of the same length, all of it text (rate 0). `valid` itself in a run
            without pauses; None without validation.
        train_names: Names of the corpora of the train blend, in the order of their dataset_id; empty for one corpus.
        valid_names: Names of the corpora of the validation blend, likewise.
        tokenizer: The tokenizer of the corpora with the pause ids.
    """

    train: TrainWindows | None
    valid: HeldOutWindows | None
    valid_without_pauses: HeldOutWindows | None
    train_names: tuple[str, ...]
    valid_names: tuple[str, ...]
    tokenizer: PauseTokenizer


class _Part(NamedTuple):
    """The corpora of the train or the validation windows, and the shares of their documents as in `data.split`."""

    blend: Blend
    split: str


@dataclass(frozen=True)
class _Plan:
    """What to build, once the corpora are known to exist and to have enough text. None: nothing for that split."""

    options: DatasetOptions
    train: _Part | None
    valid: _Part | None
    cache: Path
    tokenizer: PauseTokenizer

    def config(self, part: _Part) -> PauseGPTDatasetConfig:
        """Return megatron-core's configuration of a part."""
        options = self.options
        return PauseGPTDatasetConfig(
            random_seed=options.seed,
            sequence_length=options.sequence_length,
            blend=part.blend,
            split=part.split,
            # The index of a blend follows from its corpora in a second; from a file it would be read unchecked.
            path_to_cache=str(self.cache) if len(part.blend[0]) == 1 else None,
            window_cache_path=str(self.cache),
            read_index_cache=options.read_cache,
            tokenizer=self.tokenizer,
            reset_position_ids=options.intra_document_masking,
            reset_attention_mask=options.intra_document_masking,
            eod_mask_loss=options.eod_mask_loss,
            create_attention_mask=False,  # the model takes segments
            document_segments=options.intra_document_masking,
            pause_rate=options.pause.rate,
            pause_window=options.pause.window,
            pause_placement=options.pause.placement,
            pause_seed=options.pause.seed,
            pause_positions=options.pause.positions,
            pause_run=options.pause.run,
            pause_pattern=options.pause.pattern,
            side=options.side,
            side_weights=options.side_weights,
            model_vocab_size=self.tokenizer.vocab_size,  # the model is built from it, and padded
        )


def build_datasets(options: DatasetOptions) -> Datasets:
    """Build the datasets of a run. Every rank calls this: rank 0 builds the index caches, the other ranks wait.

    Args:
        options: The corpora, windows and sizes.

    Returns:
        The train and validation datasets.

    Raises:
        ConfigError: A split or a blend that cannot be parsed, pause options that do not fit, more samples than a blend
            without weights holds, or a cache folder that cannot be written.
        DataError: A corpus is missing, or its share of a split has less text than a window.
    """
    plan = _plan(options)
    before = cached_indices(plan.cache)
    train = _build_train(plan)
    valid, valid_without_pauses = _build_valid(plan)
    if _is_first_rank() and cached_indices(plan.cache) != before:
        _log_unused_files(plan.cache, [dataset for dataset in (train, valid) if dataset is not None])
    train_names, valid_names = (() if part is None else names_of(part.blend[0]) for part in (plan.train, plan.valid))
    return Datasets(train, valid, valid_without_pauses, train_names, valid_names, plan.tokenizer)


def _plan(options: DatasetOptions) -> _Plan:
    """Check split, blends and corpora before anything is built."""
    _check_split(options.split)
    if not options.prefix and not options.valid_prefix:
        raise ConfigError("data.prefix: expected the prefix of a prepared corpus, got nothing")
    blend = _existing("data.prefix", options.prefix)
    valid_blend = _existing("data.valid_prefix", options.valid_prefix)
    prefixes, valid_prefixes = ([] if each is None else each[0] for each in (blend, valid_blend))
    require_text(
        prefixes,
        valid_prefixes,
        split=options.split,
        sequence_length=options.sequence_length,
        pause=options.pause,
        validates=options.valid_samples > 0,
    )
    first = (prefixes or valid_prefixes)[0]
    cache = Path(options.cache or os.path.join(os.path.dirname(os.path.abspath(first)), "cache"))
    train = None if blend is None else _Part(blend, options.split)
    held_out = train if valid_blend is None else _Part(valid_blend, "0,1,0")
    valid = held_out if options.valid_samples > 0 else None
    return _Plan(options, train, valid, cache, PauseTokenizer(options.tokenizer, options.pause.embeddings))


def _existing(key: str, words: Sequence[str]) -> Blend | None:
    """Parse a blend and check that its corpora exist; None for no words."""
    if not words:
        return None
    blend = parse_blend(words)
    for prefix in blend[0]:
        if not IndexedDataset.exists(prefix):
            raise DataError(f"{key}: expected the files {prefix}.bin and {prefix}.idx, got at most one of them")
    return blend


def _check_split(split: str) -> None:
    shares = [float(word) if is_number(word) else None for word in split.split(",")]
    if len(shares) > len(Split) or any(share is None or not 0 <= share < float("inf") for share in shares):
        raise ConfigError(
            f"data.split: expected sizes of the train, validation and test splits such as 99,1,0, got {split!r}"
        )
    if not shares[0]:
        raise ConfigError(f"data.split: expected a training split above 0, got {split!r}")


def _build_train(plan: _Plan) -> TrainWindows | None:
    """Build the train split, or the windows with which a finished run is extended."""
    if plan.train is None:
        return None
    options = plan.options
    return train_windows(_build, plan.config(plan.train), options.train_samples, options.samples_before)


def _build_valid(plan: _Plan) -> tuple[HeldOutWindows | None, HeldOutWindows | None]:
    """Build the validation split, with pauses and without."""
    if plan.valid is None:
        return None, None
    config, samples = plan.config(plan.valid), plan.options.valid_samples
    valid = _build(config, Split.valid, samples)
    if config.pause_rate == 0:
        return valid, valid
    return valid, _build(dataclasses.replace(config, pause_rate=0.0), Split.valid, samples)


def _build(config: PauseGPTDatasetConfig, split: Split, samples: int | None) -> HeldOutWindows:
    """Build one split with megatron-core's builder, and no other."""
    if samples is None and config.blend[1] is not None:
        raise ConfigError(
            "data.prefix: expected a number of samples with a blend's weights, which say how often each corpus is "
            "read, got none. Give the number, or leave the weights out to read each corpus once"
        )
    config = dataclasses.replace(config)
    config.split_matrix = [config.split_matrix[each.value] if each is split else None for each in Split]
    sizes = [samples if each is split else 0 for each in Split]
    builder = BlendedMegatronDatasetBuilder(PauseGPTDataset, sizes, lambda: True, config)
    try:
        dataset = builder.build()[split.value]
    except IndexCacheError as error:
        if torch.distributed.is_initialized() and _is_first_rank():
            # The other ranks wait in the builder's barrier. They then look for the index, and fail too.
            torch.distributed.barrier()
        raise ConfigError(f"data.cache: {error}") from None
    if samples is not None and len(dataset) < samples:
        raise TooFewWindows(
            f"data.prefix: expected {samples} {split.name} samples or more in corpora that are read once each, got "
            f"{len(dataset)}. Give weights (WEIGHT PREFIX WEIGHT PREFIX ...) to have the corpora repeated"
        )
    return dataset


def names_of(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return short names of the corpora of a blend: the shortest ends of their prefixes that differ.

    Args:
        prefixes: Prefixes of the corpora, in the order of the blend.

    Returns:
        A name for each corpus; nothing for a single corpus.
    """
    if len(prefixes) < 2:
        return ()
    paths = [os.path.normpath(prefix).split(os.sep) for prefix in prefixes]
    for parts in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{path[-1]}#{number}" for number, path in enumerate(paths, start=1))


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _log_unused_files(cache: Path, datasets: Sequence[TrainWindows]) -> None:
    corpora = [corpus for dataset in datasets for corpus in corpora_of(dataset)]
    if unused := unused_files(cache, {corpus.dataset_path: corpus.config.corpus_content for corpus in corpora}):
        log.info(unused)
