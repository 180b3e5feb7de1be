"""What a start costs at 128 and 1,024 ranks, counted on torch's fake process group.

A fake world has one process, which calls what its rank would call; no message is sent.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from support.ranks import run_on_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from pause_megatron.config.load import load
from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import initialize

RANK = 9


class Collectives(TorchDispatchMode):
    """Count of the collectives on a process group, from any caller."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            self.counts[operator._opname.strip("_")] += 1
        return operator(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_world(world: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """A world of so many ranks, seen by rank 9; the sets of ranks that `new_group` was called for."""
    calls: list[list[int]] = []
    new_group = dist.new_group

    def counted(ranks=None, *args, **kwargs):
        calls.append(ranks)
        return new_group(ranks, *args, **kwargs)

    dist.init_process_group("fake", rank=RANK, world_size=world, store=FakeStore())
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dist, "new_group", counted)
            patch.setenv("LOCAL_RANK", "0")  # DeepSpeed wants to see it
            yield calls
    finally:
        dist.destroy_process_group()


def memberships() -> int:
    return len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("world", [128, 1024])
def test_only_groups_that_are_used(world, tensor, monkeypatch):
    with fake_world(world, monkeypatch) as calls, Collectives() as collectives:
        begun = time.process_time()
        with initialize(ParallelSection(tensor=tensor), device="cpu") as context:
            seconds = time.process_time() - begun
            # The tensor- and data-parallel groups of all ranks, of which three are joined: these two, and itself.
            # With one tensor-parallel rank the data-parallel group is the world, and nothing grows with the world.
            assert len(calls) == (1 if tensor == 1 else world // tensor + tensor + 1)
            assert memberships() == (2 if tensor == 1 else 4)
            assert (context.dp_group is dist.group.WORLD) == (tensor == 1)
            first = RANK - RANK % tensor
            assert dist.get_process_group_ranks(context.tp_group) == list(range(first, first + tensor))
            assert dist.get_process_group_ranks(context.dp_group) == list(range(RANK % tensor, world, tensor))
            assert parallel_state.model_parallel_is_initialized()
            assert parallel_state.get_context_parallel_world_size() == 1
            assert parallel_state.get_pipeline_model_parallel_world_size() == 1
            assert parallel_state.get_expert_model_parallel_world_size() == 1
        assert not collectives.counts
        assert memberships() == 1
        assert seconds < 5, "process seconds; 0.4 with torch 2.13, imports included"


@pytest.mark.parametrize("tensor", [1, 8])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeed_makes_no_group_and_few_collectives(zero, tensor, monkeypatch):
    from pause_megatron.model import Vocabulary, build_model, parameter_groups
    from pause_megatron.train.run import new_engine

    run = load(
        recipe="tiny-pause",
        overrides=[
            *("data.prefix=english", f"engine.zero_stage={zero}", "engine.precision=bf16", "model.preset=null"),
            *("model.layers=2", "model.hidden=64", "model.heads=8", "data.sequence_length=64", "batch.micro_size=2"),
            *("batch.global_size=1024", f"parallel.tensor={tensor}"),
        ],
    )
    with fake_world(128, monkeypatch) as calls, initialize(run.parallel, device="cpu") as context:
        calls.clear()
        with Collectives() as collectives:
            model = build_model(
                run.model,
                vocabulary=Vocabulary(256, (256,)),
                sequence_length=64,
                parallel=run.parallel,
                precision="bf16",
            )
            assert not collectives.counts
            parameters = len(list(model.parameters()))
            with new_engine(run, model, parameter_groups(model, 0.1), context):
                pass
        assert calls == []
        # Each parameter is rank 0's; ZeRO 3 cuts them, and gathers them where it checks.
        bounds = {"broadcast": parameters * (2 if zero == 3 else 1)}
        if zero == 3:
            bounds |= {"barrier": 3, "allgather_base": parameters}
        assert dict(collectives.counts) == bounds


def keys_of_a_start(tensor: int) -> int:
    """Keys that one rank's start adds to the store of a gloo world, all ranks together."""
    from pause_megatron.distributed import initialize

    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    with initialize(ParallelSection(tensor=tensor), device="cpu") as context:
        dist.all_reduce(torch.ones(1), group=context.tp_group)
        dist.all_reduce(torch.ones(1), group=context.dp_group)
        dist.barrier()
        added = store.num_keys() - before
        dist.barrier()
    return added


@pytest.mark.parametrize(("tensor", "groups"), [(1, 1), (2, 3), (4, 1)])
def test_a_group_leaves_one_key_for_each_member(tensor, groups):
    assert all(added <= 4 * groups for added in run_on_ranks(4, keys_of_a_start, tensor))
