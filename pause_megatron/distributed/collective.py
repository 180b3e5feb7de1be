"""Collectives on small objects and numbers. Without torch.distributed each returns its own value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from pause_megatron.distributed.context import ParallelContext

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """All-gather a small picklable value; return the values in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Broadcast rank 0's small picklable value; return it on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # The world is not bound to a device: without device_ids torch warns, and may choose another rank's device.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def sum_over_ranks(values: Sequence[float], context: ParallelContext) -> list[float]:
    """Return the sum of each number over all ranks, in float64: integers are exact up to 2**53.

    Args:
        values: One number a sum, the same count on every rank.
        context: Process groups of this rank.
    """
    tensor = torch.tensor(values, dtype=torch.float64, device=context.device)
    if context.world_size > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()
