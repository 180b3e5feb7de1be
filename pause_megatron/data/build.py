"""Prepared corpora -> the datasets of a run, by megatron-core's own BlendedMegatronDatasetBuilder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.config.schema import PauseSection
from pause_megatron.data.dataset import PauseGPTDataset, PauseGPTDatasetConfig, PauseTokenizer
from pause_megatron.errors import ConfigError, DataError

Blend = tuple[list[str], list[float] | None]


@dataclass(frozen=True)
class Datasets:
    """The datasets of a pretraining run.

    Attributes:
        train: At least as many samples as were asked for; None without corpora to train on.
        valid: Held-out windows with pauses, or None where the split has no documents.
        valid_without_pauses: Held-out windows of the same length with text in every place (rate 0), or None likewise.
            They are `valid` itself where the run has no pauses.
        train_names, valid_names: What the corpora of a blend are called, in the order of their dataset_id; empty for
            one corpus.
        tokenizer: The corpus's tokenizer with the pause ids.
    """

    train: PauseGPTDataset | BlendedDataset | None
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
    documents: str = "joined",
    eod_mask_loss: bool = False,
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
        documents: "joined", or "apart": positions that start again with each document, and `segments` for attention.
        eod_mask_loss: No target behind an EOD, as in Megatron-LM.

    Raises:
        ConfigError: a split or blend that cannot be read, pause options that do not fit, more samples than a blend
            without weights holds.
        DataError: a corpus that is missing, or a train split without documents.
    """
    _check_split(split)
    blends = {key: parse_blend(words) for key, words in (("prefix", prefix), ("valid_prefix", valid_prefix)) if words}
    if not blends:
        raise ConfigError("data.prefix: expected the prefix of a prepared corpus, got nothing")
    for key, (names, _) in blends.items():
        for name in names:
            if not IndexedDataset.exists(name):
                raise DataError(f"data.{key}: expected the files {name}.bin and {name}.idx, at least one is missing")
    first = next(iter(blends.values()))[0][0]
    cache = cache or os.path.join(os.path.dirname(os.path.abspath(first)), "cache")
    _remove_cut_indices(Path(cache))
    pause_tokenizer = PauseTokenizer(tokenizer, pause.embeddings)

    def config_of(blend: Blend, split: str) -> PauseGPTDatasetConfig:
        return PauseGPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=blend,
            split=split,
            path_to_cache=_blend_cache(blend, cache),
            window_cache_path=cache,
            tokenizer=pause_tokenizer,
            reset_position_ids=documents == "apart",
            reset_attention_mask=documents == "apart",
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=False,  # the model needs the segments only
            document_segments=documents == "apart",
            pause_rate=pause.rate,
            pause_window=pause.window,
            pause_placement=pause.placement,
            pause_seed=pause.seed,
            model_vocab_size=pause_tokenizer.vocab_size,  # models are made from it, and padded
        )

    train = valid = plain = None
    train_names = valid_names = ()
    if prefix:
        config = config_of(blends["prefix"], split)
        if not _has_documents(config, Split.train):
            raise DataError(f"data.split={split}: expected documents for training, the split leaves none")
        train, train_names = _build(config, Split.train, train_samples), names_of(config.blend[0])
    held_out = config_of(blends["valid_prefix"], "0,1,0") if valid_prefix else config
    if valid_samples > 0 and _has_documents(held_out, Split.valid):
        valid = plain = _build(held_out, Split.valid, valid_samples)
        valid_names = names_of(held_out.blend[0])
        if pause.rate > 0:
            plain = _build(dataclasses.replace(held_out, pause_rate=0.0), Split.valid, valid_samples)
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


def _blend_cache(blend: Blend, cache: str) -> str | None:
    # BlendedDataset asks torch.distributed for the rank as soon as it has a cache folder.
    return cache if len(blend[0]) == 1 or torch.distributed.is_initialized() else None


def parse_blend(prefix: Sequence[str]) -> Blend:
    """(WEIGHT, PREFIX, ...) or (PREFIX, ...) -> prefixes and their weights, as BlendedMegatronDatasetConfig wants them.

    Raises:
        ConfigError: nothing given, weights for some prefixes only, or a weight that is not positive.
    """
    if not prefix:
        raise ConfigError("data.prefix: expected the prefix of a prepared corpus, got nothing")
    weights = [_number(word) for word in prefix[::2]]
    if len(prefix) % 2 or all(weight is None for weight in weights):
        return list(prefix), None
    if any(weight is None or not 0 < weight < float("inf") for weight in weights):
        raise ConfigError(
            f"data.prefix: expected WEIGHT PREFIX WEIGHT PREFIX ... with weights above 0, got {' '.join(prefix)!r}"
        )
    prefixes = list(prefix[1::2])
    # One corpus needs no blending, whatever its weight.
    return prefixes, weights if len(prefixes) > 1 else None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check_split(split: str) -> None:
    shares = [_number(word) for word in split.split(",")]
    if len(shares) > len(Split) or any(share is None or not 0 <= share < float("inf") for share in shares):
        raise ConfigError(f"data.split: expected shares for train, validation, test such as 99,1,0, got {split!r}")
    if not shares[0]:
        raise ConfigError(f"data.split: expected a share above 0 for training, got {split!r}")


def _has_documents(config: PauseGPTDatasetConfig, split: Split) -> bool:
    """Whether the split has documents in every corpus of the blend. False: in none.

    Raises:
        DataError: in some of them only; megatron-core cannot blend those.
    """
    bounds = config.split_matrix[split.value]
    if bounds is None:
        return False
    prefixes = config.blend[0]
    # The builder's own rounding.
    counts = [len(IndexedDataset(prefix).sequence_lengths) for prefix in prefixes]
    empty = [
        prefix
        for prefix, count in zip(prefixes, counts, strict=True)
        if round(bounds[0] * float(count)) >= round(bounds[1] * float(count))
    ]
    if empty and len(empty) < len(prefixes):
        raise DataError(
            f"data.split={config.split}: expected documents of every corpus in the {split.name} split, "
            f"{', '.join(empty)} has too few to give any"
        )
    return not empty


def _remove_cut_indices(cache: Path) -> None:
    """Deletes index files that a killed run left unfinished: megatron-core takes any file of the right name for whole.

    On rank 0 only, before it builds; the builder lets the other ranks look at the cache after that.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for path in cache.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)  # maps the whole array: a short file is an error
        except (ValueError, EOFError):
            path.unlink(missing_ok=True)


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
    dataset = BlendedMegatronDatasetBuilder(PauseGPTDataset, sizes, lambda: True, config).build()[split.value]
    if samples is not None and len(dataset) < samples:
        raise ConfigError(
            f"data.prefix: {samples} {split.name} samples were asked for, the corpora hold {len(dataset)} and are read "
            f"once each. Give them weights (WEIGHT PREFIX WEIGHT PREFIX ...) to have them repeated"
        )
    return dataset
