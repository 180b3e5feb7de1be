"""What the keys of ds_configs/ do in the real DeepSpeed: same numbers, other operations, or nothing at all."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
from support.host_waits import asynchronous_accelerator
from support.measured import new_engine_of, random_batches
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = [
    *tiny_model(layers=2, hidden=64, heads=4, tied=False),
    *("data.sequence_length=32", "pause.rate=0.1", "batch.global_size=8", "batch.micro_size=2"),
    *("optim.warmup_steps=1", "optim.clip=0.05", "train.steps=2"),
]
IMMEDIATE = {"bf16.immediate_grad_update": True}
DELAYED = {"bf16.immediate_grad_update": False}


class Operations(TorchDispatchMode):
    """Names and shapes of everything that is done, collectives among it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        shapes = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.dtype), list(args[:3]))
        self.seen.append((str(operator), str(shapes) if operator.namespace == "aten" else len(args)))
        return operator(*args, **(kwargs or {}))


def trained(engine_name: str, precision: str, keys: dict[str, Any], asynchronous: bool = False) -> dict[str, Any]:
    """Two steps under a shipped file, some keys of it changed: losses, norms, masters; operations of the last step."""
    from unittest import mock

    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize
    from pause_megatron.engine import ADAM_STATE
    from pause_megatron.train import run
    from pause_megatron.train.losses import LossSums

    config = load(overrides=[*SMALL, f"engine.ds_config={engine_name}", f"engine.precision={precision}"])
    complete = run.deepspeed_config

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        result = copy.deepcopy(complete(*args, **kwargs))
        for key, value in keys.items():
            *path, name = key.split(".")
            target = result
            for group in path:
                target = target.setdefault(group, {})
            target[name] = value
        return result

    losses, norms = [], []
    with (
        asynchronous_accelerator() if asynchronous else contextlib.nullcontext(),
        mock.patch.object(run, "deepspeed_config", changed),
        initialize(config.parallel, device="cpu") as context,
    ):
        engine, _ = new_engine_of(config, context)
        batches = random_batches(config, context)
        targets = sum(batch.targets_count for batch in batches) * context.dp_size
        with engine:
            for _ in range(2):
                sums, operations = LossSums(context.device), Operations()
                with operations:
                    outcome = engine.train_step(batches, sums.forward, lr=1e-2, global_targets=targets)
                norms.append(outcome.grad_norm)
                losses.append(sums.totals(context).mean)
            state = [engine.state.get(a, key).tolist() for a in engine.state.owned() for key in ADAM_STATE]
    return {"losses": losses, "norms": norms, "state": state, "operations": operations.seen}


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_updating_gradients_at_once_changes_nothing_but_the_bytes(ranks):
    """Stage 1 in bf16: no bf16 gradient outlives its own backward, and none is zeroed."""
    at_once, later = (run_on_ranks(ranks, trained, "zero1", "bf16", keys) for keys in (IMMEDIATE, DELAYED))
    for mine, theirs in zip(at_once, later, strict=True):
        assert all(mine[what] == theirs[what] for what in ("losses", "norms", "state"))
        assert mine["operations"] != theirs["operations"]


def test_stage_1_updates_gradients_at_once():
    assert same("zero1", "bf16", IMMEDIATE) and not same("zero1", "bf16", DELAYED)


def same(engine: str, precision: str, keys: dict[str, Any]) -> bool:
    """Whether a file and one with other keys do the same operations, on DeepSpeed's paths for a GPU."""
    return shipped(engine, precision) == run_on_ranks(2, trained, engine, precision, keys, True)[0]["operations"]


@functools.cache
def shipped(engine: str, precision: str) -> list[tuple]:
    """The operations under a file as it is."""
    return run_on_ranks(2, trained, engine, precision, {}, True)[0]["operations"]


BUCKETS = {"zero_optimization.reduce_bucket_size": 4000, "zero_optimization.allgather_bucket_size": 4000}
OVERLAP = {"zero_optimization.overlap_comm": True}
COPIES = {"zero_optimization.contiguous_gradients": False, "zero_optimization.reduce_scatter": False}


def test_at_stage_1_in_bf16_buckets_and_overlap_do_nothing():
    """DeepSpeed takes its BF16_Optimizer: one sum of the whole fp32 gradient at the end of a step."""
    assert same("zero1", "bf16", {**BUCKETS, **OVERLAP, **COPIES})


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_buckets_of_the_gather_do_nothing(engine):
    """Parameters are gathered whole at every stage."""
    assert same(engine, "bf16", {"zero_optimization.allgather_bucket_size": 4000})


def test_in_fp32_and_at_stage_2_they_do_something():
    assert not same("zero1", "fp32", {"zero_optimization.reduce_bucket_size": 4000})
    assert not same("zero2", "bf16", {"zero_optimization.reduce_bucket_size": 4000})
    assert not same("zero2", "bf16", {"zero_optimization.contiguous_gradients": False})


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_sums_over_ranks_in_bf16_are_rounded(engine):
    """Half the bytes, for a bound on exactness that ds_configs/README.md states."""
    exact, rounded = (
        run_on_ranks(2, trained, engine, "bf16", {"communication_data_type": dtype})[0] for dtype in ("fp32", "bf16")
    )
    assert exact["norms"] != rounded["norms"]
    assert exact["norms"] == pytest.approx(rounded["norms"], rel=4e-3)
    assert exact["losses"] == pytest.approx(rounded["losses"], rel=5e-4)
