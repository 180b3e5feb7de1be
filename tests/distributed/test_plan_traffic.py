"""`plan` against real gloo ranks: bytes of collectives exactly, memory within 5 %."""

from __future__ import annotations

import pytest
from ranks import run_on_ranks

from pause_megatron.config.load import load
from pause_megatron.plan.communication import step_traffic
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.memory import rank_memory

SMALL = (
    *("model.preset=null", "model.layers=3", "model.hidden=64", "model.heads=4", "model.tied=false"),
    *("data.sequence_length=128", "batch.global_size=8", "batch.micro_size=2"),
)
SP = ("parallel.tensor=2", "parallel.sequence=true")
CASES = {
    "DP 2, stage 0": (2, ["engine.zero_stage=0"]),
    "DP 2, stage 1": (2, ["engine.zero_stage=1"]),
    "DP 2, stage 2": (2, ["engine.zero_stage=2"]),
    "DP 2, stage 3": (2, ["engine.zero_stage=3"]),
    "TP 2": (2, ["parallel.tensor=2", "parallel.recompute=full", "model.tied=true"]),
    "TP 2, sequence parallel": (2, [*SP, "engine.zero_stage=1"]),
    "DP 4, stage 1, fp32": (4, ["engine.zero_stage=1", "engine.precision=fp32", "batch.micro_size=1"]),
    "DP 2 x TP 2, sequence parallel, recomputed, stage 3": (
        4,
        [*SP, "engine.zero_stage=3", "parallel.recompute=full"],
    ),
    "DP 2 x TP 2, sequence parallel, stage 1": (4, [*SP, "engine.zero_stage=1", "model.layers=5"]),
}


def answer(overrides: list[str]) -> tuple[dict[str, int], int]:
    from measured import measure

    found = measure(overrides, steps=2)
    return found.traffic, found.peak_bytes


@pytest.mark.parametrize("name", CASES)
def test_traffic_is_exact_and_memory_close_on_real_ranks(name):
    ranks, given = CASES[name]
    overrides = [*SMALL, *given]
    layout = Layout.of(load(overrides=overrides), ranks, text_size=100)
    expected: dict[str, int] = {}
    for traffic in step_traffic(layout):
        key = f"{traffic.operation} {traffic.ranks}"
        expected[key] = expected.get(key, 0) + traffic.bytes
    for traffic, peak in run_on_ranks(ranks, answer, overrides):
        assert traffic == expected
        assert rank_memory(layout, "cpu").peak_bytes == pytest.approx(peak, rel=0.05)
