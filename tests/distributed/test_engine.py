"""The engine over any module: one gradient in every topology, and a state that is restored bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.ranks import run_on_ranks
from torch import nn

from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.engine import ADAM_STATE, learning_rate

STEPS, WINDOWS, WIDTH = 6, 8, 12


class Toy(nn.Module):
    """Rows in, one loss a row out; odd sizes, so that partitions cut across parameters and need padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))

    def forward(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        losses = self.layers(rows.to(self.layers[0].weight)).float().squeeze(-1).pow(2)
        return scale * losses.sum()


def window(step: int, number: int) -> torch.Tensor:
    """Window `number` of a step: 0 to 7 rows, so that micro-batches hold unequal numbers of targets."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn((number * 3 + step) % 8, WIDTH, generator=generator)


def config(zero: int, precision: str, micro: int, clip: float = 0.05) -> RunConfig:
    return load(
        overrides=[
            *("train.steps=6", f"batch.global_size={WINDOWS}", f"batch.micro_size={micro}", f"optim.clip={clip}"),
            *(f"engine.zero_stage={zero}", f"engine.precision={precision}", "optim.lr=0.01", "data.sequence_length=16"),
        ]
    )


def make_engine(run: RunConfig, context, prepare=lambda model: None):
    from pause_megatron.train.run import new_engine

    model = Toy()
    prepare(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return new_engine(run, model, groups, context)


def take_step(engine, run: RunConfig, context, step: int, poison: bool = False):
    from pause_megatron.data.batches.sampler import StepSampler

    sampler = StepSampler(WINDOWS, run.batch.micro_size, context.dp_rank, context.dp_size)
    batches = [torch.cat([window(step, n % WINDOWS) for n in numbers]) for numbers in sampler.indices(step)]
    if poison and context.rank == context.world_size - 1:
        batches[-1] = torch.full((1, WIDTH), float("nan"))
    total = sum(len(window(step, number)) for number in range(WINDOWS))
    return engine.train_step(
        batches,
        lambda module, rows, scale: module(rows, scale),
        lr=learning_rate(run.optim, step + 1, STEPS),
        global_targets=total,
    )


def masters(engine) -> dict[tuple, torch.Tensor]:
    return {
        (address.name, address.start, key): engine.state.get(address, key).clone()
        for address in engine.state.owned()
        for key in ADAM_STATE
    }


def grad_norms(zero: int, precision: str, micro: int) -> list[float]:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(zero, precision, micro)
    with initialize(ParallelSection()) as context, make_engine(run, context) as engine:
        return [take_step(engine, run, context, step).grad_norm for step in range(STEPS)]


def test_gradient_is_that_of_the_global_batch_whatever_the_topology():
    """Sum of losses over count of targets: DP x accumulation x ZeRO, unequal micro-batches, one list of norms."""
    reference = run_on_ranks(1, grad_norms, 0, "fp32", WINDOWS)[0]
    for (ranks, micro), zero in itertools.product(((1, 1), (2, 2), (4, 1)), range(4)):
        for norms in run_on_ranks(ranks, grad_norms, zero, "fp32", micro):
            assert norms == pytest.approx(reference, rel=2e-6), (ranks, zero, micro)


def test_bf16_follows_fp32():
    reference = run_on_ranks(1, grad_norms, 0, "fp32", WINDOWS)[0]
    for zero in range(4):
        assert run_on_ranks(2, grad_norms, zero, "bf16", 2)[0] == pytest.approx(reference, rel=0.1), zero


def poisoned(zero: int, precision: str) -> list:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(zero, precision, 2)
    with initialize(ParallelSection()) as context, make_engine(run, context) as engine:
        take_step(engine, run, context, 0)
        before, steps = masters(engine), engine.state.step
        outcome = take_step(engine, run, context, 1, poison=True)
        after = masters(engine)
        untouched = all(torch.equal(before[key], after[key]) for key in before) and engine.state.step == steps
        good = take_step(engine, run, context, 1)
        return [outcome.applied, untouched, good.applied, good.grad_norm]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(precision):
    for zero in range(4):
        for applied, untouched, good_applied, norm in run_on_ranks(2, poisoned, zero, precision):
            assert (applied, untouched, good_applied) == (False, True, True), zero
            assert norm > 0


def without_targets(zero: int) -> list[tuple]:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(zero, "fp32", 4)
    with initialize(ParallelSection()) as context, make_engine(run, context) as engine:
        outcomes = []
        for rows, targets in ((0, 0), (3, torch.tensor(0.0))):  # no targets; targets of weight 0, whose terms are not 0
            batches = [torch.ones(rows, WIDTH)] * (WINDOWS // (4 * context.dp_size))
            step = engine.train_step(batches, lambda m, rows, scale: m(rows, scale), lr=0.01, global_targets=targets)
            outcomes.append((step.applied, step.grad_norm))
        return outcomes


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_batch_without_targets_or_weights_has_a_zero_gradient(zero):
    assert run_on_ranks(2, without_targets, zero) == [[(True, 0.0)] * 2] * 2


def test_optimizer_steps_start_at_zero():
    """DeepSpeed's unfused optimizer takes a dummy step when built; Adam's bias correction must not see it."""
    for zero, precision in itertools.product(range(4), ("fp32", "bf16")):
        assert run_on_ranks(1, steps_taken, zero, precision) == [(0, 2)], (zero, precision)


def steps_taken(zero: int, precision: str) -> tuple[int, int]:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(zero, precision, WINDOWS)
    with initialize(ParallelSection()) as context, make_engine(run, context) as engine:
        before = engine.state.step
        for step in range(2):
            take_step(engine, run, context, step)
        return before, engine.state.step
