"""The model under deepspeed.initialize: one loss list for every ZeRO stage, tensor and sequence parallelism."""

from __future__ import annotations

import pytest
from support.ranks import run_on_ranks
from support.tiny_model import batch, loss_of, tiny

from pause_megatron.config.schema import ParallelSection

STEPS, FULL_STEPS = 8, 20
WINDOWS = 4
LEARNING_RATE = 3e-3


def losses_under(stage: int, tied: bool, parallel: dict, steps: int, options: dict | None = None) -> list[float]:
    """Mean token loss of the global batch, before each step."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from pause_megatron.distributed import initialize
    from pause_megatron.model import parameter_groups

    section = ParallelSection(**parallel)
    with initialize(section, device="cpu") as context:
        model = tiny(parallel=section, pauses=2, tied=tied, **(options or {}))
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=LEARNING_RATE, betas=(0.9, 0.95))
        config = {
            "train_batch_size": WINDOWS,
            "train_micro_batch_size_per_gpu": WINDOWS // context.dp_size,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=context.mpu)
        losses = []
        for step in range(steps):
            everything = batch(0.7, pauses=2, seed=step % 2, size=WINDOWS)
            count = int(everything["mask"].sum())
            mine = _windows(everything, context.dp_rank, context.dp_size)
            out = loss_of(engine, mine, context.dp_size / count)
            engine.backward(out.loss)
            engine.step()
            total = out.sum.clone()
            dist.all_reduce(total, group=context.dp_group)
            losses.append(float(total) / count)
        engine.destroy()
        return losses


def _windows(data: dict, rank: int, ranks: int) -> dict:
    """Every `ranks`-th window: unequal numbers of targets per rank."""
    cut = {key: data[key][rank::ranks] for key in ("tokens", "position_ids", "labels", "mask")}
    rows = cut["mask"].t().reshape(-1).nonzero().squeeze(1)
    return {**cut, "rows": rows, "targets": cut["labels"].t().reshape(-1)[rows]}


# Tied embeddings, whose one matrix ZeRO-3 must gather for two modules; the integration test trains untied ones.
CASES = [
    (2, 2, {}),
    (2, 3, {"recompute": "full"}),
    (2, 1, {"tensor": 2, "sequence": True}),
    (2, 3, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (4, 2, {"tensor": 2, "sequence": True}),
    (4, 3, {"tensor": 4}),
]


def test_one_loss_list(full):
    steps = FULL_STEPS if full else STEPS
    expected = run_on_ranks(1, losses_under, 0, True, {}, steps)[0]
    assert expected[-1] < 0.97 * expected[0]
    for ranks, stage, parallel in CASES:
        for losses in run_on_ranks(ranks, losses_under, stage, True, parallel, steps):
            assert losses == pytest.approx(expected, rel=1e-5), (ranks, stage, parallel)


# Norms whose weight a rank has whole and uses in part, and biases, which ZeRO-3 must not free before they are added.
OPTIONS = [
    {"qk_norm": "whole", "norm": "post", "kv_heads": 2, "qkv_bias": True, "proj_bias": True, "head_dim": 12},
    {"mlp_bias": True, "qkv_bias": True, "proj_bias": True, "rope_scaling": "linear", "rope_factor": 2.0},
    {"qk_norm": "head", "kv_heads": 1, "sliding_window": 5, "loops": 3, "loop_layers": "1..1"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["olmo2", "llama", "qwen3"])
def test_one_loss_list_with_the_options_of_families(options):
    (expected,) = run_on_ranks(1, losses_under, 0, False, {}, STEPS // 2, options)
    assert expected[2] != pytest.approx(expected[0], rel=1e-3)  # the weights changed
    for ranks, stage, parallel in (CASES[1], CASES[3], CASES[5]):
        for losses in run_on_ranks(ranks, losses_under, stage, False, parallel, STEPS // 2, options):
            assert losses == pytest.approx(expected, rel=1e-5), (ranks, stage, parallel)
