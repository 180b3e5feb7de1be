"""Prepared corpora -> the datasets of a run, by megatron-core's own BlendedMegatronDatasetBuilder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.config.blend import Blend, is_number, parse_blend
from pause_megatron.config.schema import PauseSection
from pause_megatron.data.batches.loader import Samples
from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseGPTDatasetConfig, PauseTokenizer
from pause_megatron.data.windows.extension import TooFewWindows, read_on
from pause_megatron.data.windows.index_cache import IndexCacheError, cached_indices, unused_files
from pause_megatron.data.windows.split_text import require_text
from pause_megatron.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """The datasets of a pretraining run.

    Attributes:
        train: At least as many samples as were asked for; None without corpora to train on.
        valid: Held-out windows with pauses, or None where none were asked for.
        valid_without_pauses: Held-out windows of the same length with text in every place (rate 0), or None likewise.
            They are `valid` itself where the run has no pauses.
        train_names, valid_names: What the corpora of a blend are called, in the order of their dataset_id; empty for
            one corpus.
        tokenizer: The corpus's tokenizer with the pause ids.
    """

    train: Samples | None
    valid: PauseGPTDataset | BlendedDataset | None
    valid_without_pauses: PauseGPTDataset | BlendedDataset | None
    train_names: tuple[str, ...]
    valid_names: tuple[str, ...]
    tokenizer: PauseTokenizer


def build_datasets(
    prefix: Sequence[str],
    *,
    valid_prefix: Sequence[str] = (),
    split: str,
    sequence_length: int,
    tokenizer: object,
    pause: PauseSection,
    seed: int,
    train_samples: int | None,
    valid_samples: int,
    cache: str | None = None,
    intra_document_masking: bool = False,
    eod_mask_loss: bool = False,
    read_cache: bool = False,
    samples_before: int = 0,
) -> Datasets:
    """Builds train and validation datasets. Call it on every rank: rank 0 builds the index caches, the others wait.

    The number of samples is part of megatron-core's cache key and decides how often, and in which order, the
    documents are shuffled. Another number is another order. So give the number that the whole run needs (steps *
    global batch), the same at every start; a run that is resumed with another one sees another order from there on.

    Args:
        prefix: Prefixes of prepared corpora: one; several, which are then read once each; or a blend
            (WEIGHT, PREFIX, WEIGHT, PREFIX, ...) as in Megatron-LM's --data-path, repeated as often as needed. None:
            nothing to train on is built.
        valid_prefix: Likewise, corpora to validate on; then `split` gives all of `prefix` to training.
        split: Shares of the documents for train, validation and test, e.g. "99,1,0".
        sequence_length: Tokens of a window, pauses included.
        tokenizer: The corpus's tokenizer; see PauseTokenizer for what it must have.
        pause: The pause options.
        seed: Seed of the sample order.
        train_samples: Windows that the whole run trains on; None: those of one pass over the corpora.
        valid_samples: Windows that one validation scores; 0 builds none.
        cache: Folder of the index caches; default: 'cache' beside the first prefix.
        intra_document_masking: Start positions again with each document, and give `segments` for attention.
        eod_mask_loss: No target behind an EOD, as in Megatron-LM.
        read_cache: Compare index caches with their digests byte by byte, not only those changed since.
        samples_before: Windows of these that a finished run was given, which is now extended: `data.extension` says
            what the others are.

    Raises:
        ConfigError: a split or blend that cannot be read, pause options that do not fit, more samples than a blend
            without weights holds, a cache folder that cannot be written.
        DataError: a corpus that is missing, or one whose share of a split has less text than a window.
    """
    _check_split(split)
    blends = {key: parse_blend(words) for key, words in (("prefix", prefix), ("valid_prefix", valid_prefix)) if words}
    if not blends:
        raise ConfigError("data.prefix: expected the prefix of a prepared corpus, got nothing")
    for key, (names, _) in blends.items():
        for name in names:
            if not IndexedDataset.exists(name):
                raise DataError(f"data.{key}: expected the files {name}.bin and {name}.idx, at least one is missing")
    require_text(
        *(blends.get(key, ([], None))[0] for key in ("prefix", "valid_prefix")),
        split=split,
        sequence_length=sequence_length,
        pause=pause,
        validates=valid_samples > 0,
    )
    first = next(iter(blends.values()))[0][0]
    cache = cache or os.path.join(os.path.dirname(os.path.abspath(first)), "cache")
    pause_tokenizer = PauseTokenizer(tokenizer, pause.embeddings)

    def config_of(blend: Blend, split: str) -> PauseGPTDatasetConfig:
        return PauseGPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=blend,
            split=split,
            # A blend's order follows from its corpora in a second; from a file it would be read unchecked.
            path_to_cache=cache if len(blend[0]) == 1 else None,
            window_cache_path=cache,
            read_index_cache=read_cache,
            tokenizer=pause_tokenizer,
            reset_position_ids=intra_document_masking,
            reset_attention_mask=intra_document_masking,
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=False,  # the model needs the segments only
            document_segments=intra_document_masking,
            pause_rate=pause.rate,
            pause_window=pause.window,
            pause_placement=pause.placement,
            pause_seed=pause.seed,
            model_vocab_size=pause_tokenizer.vocab_size,  # models are made from it, and padded
        )

    train = valid = plain = None
    train_names = valid_names = ()
    before = cached_indices(Path(cache))
    if prefix:
        config = config_of(blends["prefix"], split)
        train_names = names_of(config.blend[0])
        train = read_on(_build, config, train_samples, samples_before)
    if valid_samples > 0:
        held_out = config_of(blends["valid_prefix"], "0,1,0") if valid_prefix else config
        valid = plain = _build(held_out, Split.valid, valid_samples)
        valid_names = names_of(held_out.blend[0])
        if pause.rate > 0:
            plain = _build(dataclasses.replace(held_out, pause_rate=0.0), Split.valid, valid_samples)
    if _is_first_rank() and cached_indices(Path(cache)) != before:
        _say_what_is_unused(Path(cache), [part for part in (train, valid) if part is not None])
    return Datasets(train, valid, plain, train_names, valid_names, pause_tokenizer)


def names_of(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Short names for the corpora of a blend: the prefixes from where they differ on; none for one corpus."""
    if len(prefixes) < 2:
        return ()
    paths = [os.path.normpath(prefix).split(os.sep) for prefix in prefixes]
    for parts in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{path[-1]}#{number}" for number, path in enumerate(paths, start=1))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check_split(split: str) -> None:
    shares = [float(word) if is_number(word) else None for word in split.split(",")]
    if len(shares) > len(Split) or any(share is None or not 0 <= share < float("inf") for share in shares):
        raise ConfigError(f"data.split: expected shares for train, validation, test such as 99,1,0, got {split!r}")
    if not shares[0]:
        raise ConfigError(f"data.split: expected a share above 0 for training, got {split!r}")


def _build(config: PauseGPTDatasetConfig, split: Split, samples: int | None) -> PauseGPTDataset | BlendedDataset:
    """One split, by the stock builder. The others are not built."""
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
            # The builder lets the other ranks look at the cache once rank 0 has built it. They find none, and say so.
            torch.distributed.barrier()
        raise ConfigError(f"data.cache: {error}") from None
    if samples is not None and len(dataset) < samples:
        raise TooFewWindows(
            f"data.prefix: {samples} {split.name} samples were asked for, the corpora hold {len(dataset)} and are read "
            f"once each. Give them weights (WEIGHT PREFIX WEIGHT PREFIX ...) to have them repeated"
        )
    return dataset


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _say_what_is_unused(cache: Path, built: Sequence[PauseGPTDataset | BlendedDataset]) -> None:
    parts = [part for dataset in built for part in getattr(dataset, "datasets", [dataset])]
    if unused := unused_files(cache, {part.dataset_path: part.config.corpus_content for part in parts}):
        log.info(unused)
