"""The process groups of a run: the world, this rank's tensor- and data-parallel groups, and itself.

megatron-core's `initialize_model_parallel` creates a group for every set of ranks of every kind of parallelism, also
those of other ranks: 1,414 at 128 ranks, 17 of them with this rank. Without pipeline, context and expert parallelism
there are four distinct sets of ranks. So each set is created once, and the set of all ranks is the world itself.

Each rank calls `torch.distributed.new_group` for the other ranks' groups too, in the same order, which costs no
message: torch numbers the groups. `use_local_synchronization` would spare those calls, but before torch 2.15 it names a
group by its ranks and the number of living groups. A second topology in one world would then collide with the store
keys of the first. A group of one rank cannot collide: that rank alone creates it.

The world is not bound to a device (`init_process_group(device_id=...)`). If it is, torch (2.11 to 2.15) builds each
later group at once, by a split of the world's communicator that all ranks must join. Unbound, NCCL builds a
communicator at its first use, among its members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


def make_groups(tensor: int, timeout: timedelta) -> None:
    """Fill megatron-core's `parallel_state` for a split of the world into tensor- and data-parallel groups.

    Args:
        tensor: Tensor-parallel size; its ranks are neighbours. Divides the world size.
        timeout: Timeout of a collective.
    """
    with _distinct_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
            create_gloo_process_groups=False,
        )


@contextmanager
def _distinct_groups() -> Iterator[None]:
    """Replace megatron-core's `create_group` while the body runs; the sets of ranks stay megatron-core's choice."""
    original = parallel_state.create_group
    parallel_state.create_group = _group_maker(dist.get_rank(), dist.get_world_size())
    try:
        yield
    finally:
        parallel_state.create_group = original


def _group_maker(rank: int, world_size: int) -> Callable[..., Any]:
    made: dict[tuple[int, ...], Any] = {tuple(range(world_size)): dist.group.WORLD}

    def create_group(ranks: list[int], timeout: timedelta | None = None, **others: Any) -> Any:
        members = tuple(ranks)
        if members not in made and len(members) == 1 and members[0] != rank:
            return dist.GroupMember.NON_GROUP_MEMBER
        if members not in made:
            alone = len(members) == 1
            made[members] = dist.new_group(list(members), timeout=timeout, use_local_synchronization=alone)
        return made[members]

    return create_group
