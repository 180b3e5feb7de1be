"""Small objects between ranks. Each function is also right in a process that is alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from pause_megatron.distributed.context import ParallelContext

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """What every rank passed, in rank order, on every rank. Small picklable values only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """What rank 0 passed, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Named, since the world is not bound to a device: torch else warns, and might choose another rank's.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def sum_over_ranks(values: Sequence[float], context: ParallelContext) -> list[float]:
    """Sum of each number over all ranks, in float64: whole numbers stay exact up to 2**53."""
    tensor = torch.tensor(values, dtype=torch.float64, device=context.device)
    if context.world_size > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()
