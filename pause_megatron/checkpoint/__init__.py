"""Checkpoints that are complete or invisible, and load at any ZeRO stage, tensor- and data-parallel size.

Layout of `RUN/checkpoints/`:

    latest -> step-00000200            moved once its target is complete; `run_folder` says what it means
    step-00000200/
        manifest.json                  written last: names every file with its size and digest, and has one of its own
        config.yaml                    the resolved configuration
        tokenizer/                     what decodes this model's ids
        state-tp00-of-02-dp0001-of-0004.safetensors

A state file holds 1-D fp32 tensors named `KEY|PARAMETER|START`: elements START.. of the flattened parameter (the
tensor-parallel rank's shard of it), where KEY is `param` (the fp32 master weights), `exp_avg` or `exp_avg_sq`. Nothing
is pickled, so nothing in a checkpoint can run.
"""

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.merge import MergedReader, ShardReader, load_weights, restore_masters
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.checkpoint.restore import restore_engine, restore_weights
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
