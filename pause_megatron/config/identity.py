"""Which keys decide what a run computes, which only say where, how fast and how chattily, which are a rank's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from pause_megatron.config.blend import is_number
from pause_megatron.config.schema import ResolvedConfig

# What may change between the parts of a run, because the losses do not depend on it.
FREE_SECTIONS = frozenset({"parallel", "checkpoint", "validation", "log"})
FREE_KEYS = frozenset(
    {
        *("run.dir", "run.hang_seconds", "run.connect_seconds", "run.start_over"),
        *("data.prefix", "data.valid_prefix", "data.tokenizer", "data.cache"),  # the data are compared by their content
        *("data.verify", "data.prefetch"),
        "task.path",
        *("model.attention", "model.head_chunk"),
        "batch.micro_size",
        *("engine.ds_config", "engine.zero_stage", "engine.kernels", "engine.deterministic"),
    }
)

# What may change besides at the step at which a finished run is extended (train.extended_from).
LENGTH_KEYS = ("train.steps", "train.tokens", "train.extended_from", "finetune.epochs")
SCHEDULE_KEYS = (
    *("optim.lr", "optim.min_lr_fraction", "optim.warmup_steps", "optim.schedule", "optim.decay_fraction"),
)
# What may differ between the ranks of a run: where a host has its copy of something whose content ranks compare.
LOCAL_KEYS = frozenset({"data.prefix", "data.valid_prefix", "data.tokenizer", "task.path"})


def deciding_keys(config: ResolvedConfig) -> dict[str, Any]:
    """The keys that decide the losses, by their dotted path, in the order of the schema."""
    return {
        key: value
        for key, value in _keys(config)
        if key.partition(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
    }


def corpus_names(words: Iterable[str]) -> tuple[str, ...]:
    """The names of corpora without their folders: with the seed they decide where pauses are. Weights are left out."""
    return tuple(os.path.basename(word) for word in words if not is_number(word))


def compared_keys(config: ResolvedConfig) -> dict[str, Any]:
    """The keys that must be the same on every rank, by their dotted path, in the order of the schema: all but a few."""
    return {key: value for key, value in _keys(config) if key not in LOCAL_KEYS}


def _keys(config: ResolvedConfig) -> Iterator[tuple[str, Any]]:
    for section in type(config).model_fields:
        values = getattr(config, section)
        for name, field in type(values).model_fields.items():
            yield f"{section}.{field.alias or name}", getattr(values, name)
