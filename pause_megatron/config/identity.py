"""Keys by their effect: those that decide the losses, those that do not, and those that may differ between ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from pause_megatron.config.blend import is_number
from pause_megatron.config.renamed import with_old_names
from pause_megatron.config.schema import ResolvedConfig

# Keys that may change when a run resumes, because they do not affect the losses.
FREE_SECTIONS = frozenset({"parallel", "checkpoint", "validation", "log"})
FREE_KEYS = frozenset(
    {
        *("run.dir", "run.hang_seconds", "run.connect_seconds", "run.start_over"),
        *("data.prefix", "data.valid_prefix", "data.tokenizer", "data.cache"),  # the data are compared by their content
        *("data.verify", "data.prefetch"),
        *("task.path", "task.scores"),
        *("model.attention", "model.head_chunk", "model.family", "model.positions"),
        "batch.micro_size",
        *("engine.ds_config", "engine.zero_stage", "engine.kernels", "engine.deterministic"),
    }
)

# Keys that may change as well at the step at which a finished run is extended (train.extended_from).
LENGTH_KEYS = ("train.steps", "train.tokens", "train.extended_from", "finetune.epochs")
SCHEDULE_KEYS = (
    *("optim.lr", "optim.min_lr_fraction", "optim.warmup_steps", "optim.schedule", "optim.decay_fraction"),
)
# Keys that were added after digests of configurations had been stored. A digest leaves them out at this, their default.
ADDED_KEYS: dict[str, int | float | str | tuple[str, ...] | None] = {
    **{"model.loops": 1, "model.loop_layers": None},
    **{"data.side": None, "pause.run": 1, "pause.pattern": None, "pause.positions": "own"},
    **{"objective.name": "cross_entropy", "objective.discount": 1.0, "objective.stop_rate": 0.5},
    **{"objective.step_cost": 0.1, "objective.z_loss": 0.0, "objective.token_weights": None},
    **{"finetune.answer_placement": None, "finetune.answer_rate": 0.1},
    **{f"model.{name}": None for name in ("head_dim", "qk_norm", "sliding_window", "rope_scaling")},
    **{f"model.{name}": None for name in ("rope_original_length", "rope_attention_factor")},
    **{"model.proj_bias": False, "model.mlp_bias": False, "model.norm": "pre", "model.sliding_from": 0},
    **{"model.rope_factor": 1.0, "model.rope_low_freq": 1.0, "model.rope_high_freq": 4.0},
    **{"model.rope_beta_fast": 32.0, "model.rope_beta_slow": 1.0, "model.rope_truncate": True},
    "finetune.pause_targets": False,
    "finetune.auxiliary_heads": False,
    "finetune.hint_weight": 1.0,
    **{"lora.rank": 16, "lora.alpha": 32.0, "lora.targets": ("qkv", "proj", "fc1", "fc2"), "lora.layers": None},
}
# Keys that were added later and that no digest has, for they are free.
ADDED_FREE_KEYS = ("model.family", "model.positions", "task.scores")
# Keys that may differ between the ranks of a run: paths of copies whose content the ranks compare.
LOCAL_KEYS = frozenset({"data.prefix", "data.valid_prefix", "data.tokenizer", "task.path", "task.scores"})


def deciding_keys(config: ResolvedConfig) -> dict[str, Any]:
    """Return the keys that decide the losses, by their dotted path, in the order of the schema.

    `task.held_out` is left out where nothing is held out (also without a task), so that digests of earlier runs stay.

    Args:
        config: Resolved configuration.
    """
    unused = set() if config.task.name is not None and config.task.held_out else {"task.held_out"}
    return {
        key: value
        for key, value in _keys(config)
        if key.partition(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS and key not in unused
    }


def digest_keys(config: ResolvedConfig) -> dict[str, Any]:
    """Return `deciding_keys` as digests have them: under their earliest names, without added keys at their default.

    Args:
        config: Resolved configuration.
    """
    missing = object()
    kept = {key: value for key, value in deciding_keys(config).items() if value != ADDED_KEYS.get(key, missing)}
    return with_old_names(kept)


def corpus_names(words: Iterable[str]) -> tuple[str, ...]:
    """Return the names of corpora without their folders; with the seed they decide where pauses are.

    Args:
        words: Prefixes, or a blend; its weights are left out.
    """
    return tuple(os.path.basename(word) for word in words if not is_number(word))


def compared_keys(config: ResolvedConfig) -> dict[str, Any]:
    """Return the keys that must be the same on every rank, by their dotted path: all but `LOCAL_KEYS`.

    Args:
        config: Resolved configuration.
    """
    return {key: value for key, value in _keys(config) if key not in LOCAL_KEYS}


def _keys(config: ResolvedConfig) -> Iterator[tuple[str, Any]]:
    for section in type(config).model_fields:
        values = getattr(config, section)
        for name, field in type(values).model_fields.items():
            yield f"{section}.{field.alias or name}", getattr(values, name)
