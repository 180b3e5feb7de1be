"""The configuration of a run: typed sections, loading and checking, and batch arithmetic. Imports no torch."""

from __future__ import annotations

from pause_megatron.config.batching import BatchPlan, batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.load import dump, load, scheduled
from pause_megatron.config.schema import ResolvedConfig, RunConfig, ScheduledConfig

__all__ = [
    "BatchPlan",
    "ResolvedConfig",
    "RunConfig",
    "ScheduledConfig",
    "batch_plan",
    "deepspeed_config",
    "dump",
    "load",
    "scheduled",
]
