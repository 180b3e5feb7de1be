"""Seconds of computing: what bounds a kernel, what the fused kernels spare, and what published runs reached."""

from __future__ import annotations

import pytest

from pause_megatron.config.load import load
from pause_megatron.plan import GPUS, Assumptions, Cluster, make_plan
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.work import Work, step_work

TEXT_SIZE = 32_000


def plan(recipe: str, *overrides: str, gpu: str = "h100", gpus: int = 8, **assumed: float):
    cluster = Cluster(GPUS[gpu], 1, gpus)
    assumptions = Assumptions.of(cluster.gpu).with_values(assumed)
    return make_plan(load(recipe=recipe, overrides=overrides), cluster, text_size=TEXT_SIZE, assumptions=assumptions)


def layout(*overrides: str, ranks: int = 8) -> Layout:
    return Layout.of(load(recipe="c4-1b-pause", overrides=overrides), ranks, TEXT_SIZE)


@pytest.mark.parametrize(
    ("gpu", "low", "high"),
    [
        # llm-foundry's 1B on 8 GPUs, without fused rotary embedding, SwiGLU or cross-entropy.
        ("h100", 0.40, 0.45),
        ("a100-80", 0.56, 0.60),
    ],
)
def test_published_runs_come_out(gpu, low, high):
    unfused = plan("c4-1b-pause", "engine.kernels=plain", gpu=gpu)
    assert low <= unfused.computing_mfu <= high


def test_a_kernel_takes_what_bounds_it():
    base = plan("c4-1b-pause").time.parts
    for name, field in (
        ("product_efficiency", "products"),
        ("attention_efficiency", "attention"),
        ("memory_efficiency", "memory"),
    ):
        faster = plan("c4-1b-pause", **{name: 0.95}).time.parts
        changed = {f for f in ("products", "attention", "memory") if getattr(faster, f) != getattr(base, f)}
        assert changed == {field}
    assert base.memory / plan("c4-1b-pause", gpu="h200").time.parts.memory == pytest.approx(4.8 / 3.352)


def test_the_parts_are_the_whole():
    time = plan("c4-130m-pause").time
    parts = time.parts
    assert time.compute_seconds == pytest.approx(
        parts.products + parts.attention + parts.memory + parts.update + parts.waiting
    )


def test_a_slow_host_is_waited_for():
    slow = plan("c4-130m-pause", "batch.micro_size=1", launch_seconds=1e-3).time
    layout = plan("c4-130m-pause", "batch.micro_size=1").layout
    work = step_work(layout)
    launched = work.micro_batches * work.micro_batch.kernels + work.gradients.kernels + work.update.kernels
    assert slow.compute_seconds == pytest.approx(1e-3 * launched)


def test_an_mfu_that_is_given_wins():
    assert plan("c4-1b-pause", mfu=0.3).computing_mfu == pytest.approx(0.3)
    assert plan("c4-1b-pause", mfu=0.3, product_efficiency=0.1).computing_mfu == pytest.approx(0.3)


@pytest.mark.parametrize("recipe", ["c4-130m-pause", "c4-1b-pause"])
def test_fused_kernels_move_half_the_bytes(recipe):
    fused, unfused = (step_work(plan(recipe, f"engine.kernels={kind}").layout) for kind in ("triton", "plain"))
    assert fused.layers.bytes < 0.5 * unfused.layers.bytes
    assert fused.head.bytes < 0.15 * unfused.head.bytes
    for part in ("layers", "head", "ends"):
        assert getattr(fused, part).products == getattr(unfused, part).products


def test_recomputation_adds_a_forward_pass():
    once, again = (step_work(layout(f"parallel.recompute={how}")).layers for how in ("none", "full"))
    assert again.products * 3 == once.products * 4
    assert again.attention * 14 == once.attention * 18
    assert once.bytes < again.bytes < 1.5 * once.bytes


def test_tensor_parallel_ranks_share_the_work():
    one, two = (step_work(layout(f"parallel.tensor={ranks}", "batch.micro_size=4")) for ranks in (1, 2))
    assert one.layers.products == 2 * two.layers.products
    assert one.layers.attention == 2 * two.layers.attention
    assert two.layers.bytes > one.layers.bytes / 2  # norms and residuals are on both, without sequence parallelism


def test_work_adds_up():
    one, two = Work(1, 2, 3, 4), Work(10, 20, 30, 40)
    assert one + two == Work(11, 22, 33, 44)
    assert one * 3 == Work(3, 6, 9, 12)
