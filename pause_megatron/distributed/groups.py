"""The process groups of a run: the world, this rank's tensor- and data-parallel groups, and itself.

megatron-core's `initialize_model_parallel` makes a group for every set of ranks of every kind of parallelism, those of
other ranks too: 1,414 at 128 ranks, 17 of them with this rank. Without pipeline, context and expert parallelism all of
them are one of four sets of ranks, so here each set is made once, and a set that is all ranks is the world itself.

Each rank calls `torch.distributed.new_group` for the other ranks' groups too, in one order, which costs no message:
torch numbers the groups. (`use_local_synchronization` would spare those calls; before torch 2.15 it names a group by
its ranks and the number of living groups, and a second topology in one world would meet the keys of the first in the
store.) A group of one rank has nobody to meet there: it is made by that rank alone.

The world is not bound to a device (`init_process_group(device_id=...)`): torch (2.11 to 2.15) then builds each later
group at once, by a split of the world's communicator that all ranks of the world must join. Unbound, NCCL builds a
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
        tensor: ranks of a tensor-parallel group, neighbours; divides the world size.
        timeout: of a collective operation.
    """
    with _each_set_once():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
            create_gloo_process_groups=False,
        )


@contextmanager
def _each_set_once() -> Iterator[None]:
    """Stands in for megatron-core's own way to make a group: who belongs to which stays its decision."""
    theirs = parallel_state.create_group
    parallel_state.create_group = _group_maker(dist.get_rank(), dist.get_world_size())
    try:
        yield
    finally:
        parallel_state.create_group = theirs


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
