"""What a run is: typed sections, one way to load them, and the arithmetic that follows. Imports no torch."""

from __future__ import annotations

from pause_megatron.config.batching import BatchPlan, batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.load import dump, load
from pause_megatron.config.schema import RunConfig

__all__ = ["BatchPlan", "RunConfig", "batch_plan", "deepspeed_config", "dump", "load"]
