"""Ranks, process groups, and what megatron-core and DeepSpeed want to know about them."""

from __future__ import annotations

from pause_megatron.distributed.context import ParallelContext, initialize
from pause_megatron.distributed.ranks import Ranks, discover

__all__ = ["ParallelContext", "Ranks", "discover", "initialize"]
