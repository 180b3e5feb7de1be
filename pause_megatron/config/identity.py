"""Which keys decide what a run computes, and which only say where, how fast and how chattily it does so."""

from __future__ import annotations

from typing import Any

from pause_megatron.config.schema import RunConfig

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


def deciding_keys(config: RunConfig) -> dict[str, Any]:
    """The keys that decide the losses, by their dotted path, in the order of the schema."""
    found = {}
    for section in type(config).model_fields:
        values = getattr(config, section)
        for name, field in type(values).model_fields.items():
            key = f"{section}.{field.alias or name}"
            if section not in FREE_SECTIONS and key not in FREE_KEYS:
                found[key] = getattr(values, name)
    return found
