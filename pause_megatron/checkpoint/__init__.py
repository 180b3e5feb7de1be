"""Checkpoints: saved atomically, and loaded at any tensor-parallel size, data-parallel size and ZeRO stage.

Layout of `RUN/checkpoints/`:

    latest -> step-00000200            moved once its target is complete; `pause_megatron.run_folder` has the rule
    step-00000200/
        manifest.json                  written last: size and digest of every file, and a digest of itself
        config.yaml                    the resolved configuration
        tokenizer/                     the tokenizer that the model was trained with
        state-tp00-of-02-dp0001-of-0004.safetensors

A state file holds 1-D fp32 tensors named `KEY|PARAMETER|START`: elements from START on of the flattened parameter (of
the tensor-parallel rank's shard), where KEY is `param` (the fp32 master weights), `exp_avg` or `exp_avg_sq`. Nothing is
pickled, so loading a checkpoint executes no code. `checkpoint.format` spells these names.
"""

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.merge import MergedReader
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.checkpoint.restore import (
    ShardReader,
    load_weights,
    restore_engine,
    restore_masters,
    restore_weights,
)
from pause_megatron.checkpoint.save import save
from pause_megatron.checkpoint.store import Store

__all__ = [
    "CheckpointReader",
    "Manifest",
    "MergedReader",
    "ShardReader",
    "Store",
    "load_weights",
    "restore_engine",
    "restore_masters",
    "restore_weights",
    "save",
]
