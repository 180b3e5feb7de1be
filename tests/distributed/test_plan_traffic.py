"""`plan` against real gloo ranks: the bytes of their collectives, exactly."""

from __future__ import annotations

from collections import Counter

import pytest
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.config.load import load
from pause_megatron.plan.communication import step_traffic
from pause_megatron.plan.layout import Layout

SMALL = (
    *tiny_model(layers=2, hidden=64, heads=4, tied=False),
    *("data.sequence_length=128", "batch.global_size=8", "batch.micro_size=2"),
)
QWEN3 = ("model.heads=2", "model.head_dim=64", "model.qk_norm=head")
OLMO2 = ("model.qk_norm=whole", "model.norm=post", "model.kv_heads=2", "model.head_dim=32")
BIASES = ("model.qkv_bias=true", "model.proj_bias=true", "model.mlp_bias=true")
SP = ("parallel.tensor=2", "parallel.sequence=true")
CASES = {
    "DP 2, stage 0": (2, ["engine.zero_stage=0"]),
    "DP 2, stage 1": (2, ["engine.zero_stage=1"]),
    "DP 2, stage 2": (2, ["engine.zero_stage=2"]),
    "DP 2, stage 3": (2, ["engine.zero_stage=3"]),
    "TP 2": (2, ["parallel.tensor=2", "parallel.recompute=full", "model.tied=true"]),
    "TP 2, sequence parallel": (2, [*SP, "engine.zero_stage=1"]),
    "DP 2, looped, recomputed, stage 3": (
        2,
        ["engine.zero_stage=3", "model.loops=3", "model.loop_layers=0..0", "parallel.recompute=full"],
    ),
    "TP 2, sequence parallel, looped": (2, [*SP, "engine.zero_stage=1", "model.loops=3", "model.loop_layers=1..1"]),
    "DP 4, stage 1, fp32": (4, ["engine.zero_stage=1", "engine.precision=fp32", "batch.micro_size=1"]),
    "DP 2 x TP 2, sequence parallel, recomputed, stage 3": (
        4,
        [*SP, "engine.zero_stage=3", "parallel.recompute=full"],
    ),
    "DP 2 x TP 2, like Qwen3": (4, [*QWEN3, "parallel.tensor=2"]),
    "TP 4, like OLMo 2, sequence parallel": (4, [*OLMO2, "parallel.tensor=4", "parallel.sequence=true"]),
    "TP 4, shared key/value heads, every bias, looped": (
        4,
        [*BIASES, "parallel.tensor=4", "model.kv_heads=1", "model.loops=2", "parallel.recompute=full"],
    ),
    "DP 2 x TP 2, sequence parallel, stage 1": (4, [*SP, "engine.zero_stage=1"]),
}


# Their traffic is part of what the cases on four ranks send.
PARTS = ("DP 2, stage 1", "TP 2, sequence parallel")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in PARTS)) for name in CASES])
def test_traffic_is_exact_on_real_ranks(name):
    ranks, given = CASES[name]
    overrides = [*SMALL, *given]
    expected: Counter[str] = Counter()
    for sent in step_traffic(Layout.of(load(overrides=overrides), ranks, text_size=100)):
        expected[f"{sent.operation} {sent.ranks}"] += sent.bytes
    assert run_on_ranks(ranks, "support.measured:traffic", overrides) == [dict(expected)] * ranks
