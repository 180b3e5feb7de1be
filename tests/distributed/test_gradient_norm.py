"""The gradient norm and clipping by it are those of float64 arithmetic, at every ZeRO stage, on 12 M parameters.

Sums over so many squares show what a small model hides: torch's fp32 norm on a CPU is 0.06 % too small here.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.ranks import run_on_ranks
from torch import nn

from pause_megatron.config.load import load
from pause_megatron.config.schema import ParallelSection, RunConfig

INPUT, OUTPUT, WINDOWS, STEPS, CLIP = 3000, 4_000, 2, 2, 0.5
RANKS = {"one rank": (1, 1), "data parallel": (2, 1), "tensor parallel": (2, 2)}
ENGINES = ("zero0", "zero1", "zero2", "zero3")


class Wide(nn.Module):
    """A column-parallel matrix of 12 M elements behind a bias that all tensor-parallel ranks hold."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        share = OUTPUT // ranks
        generator = torch.Generator().manual_seed(0)
        weight = torch.empty(OUTPUT, INPUT).uniform_(-0.02, 0.02, generator=generator)[rank * share :][:share]
        self.weight = nn.Parameter(weight.clone())
        self.weight.tensor_model_parallel = ranks > 1
        self.bias = nn.Parameter(torch.zeros(INPUT))

    def forward(self, rows: torch.Tensor, scale: float, copied=lambda rows: rows) -> torch.Tensor:
        rows = copied(rows.to(self.bias.dtype) + self.bias)
        return scale * (rows @ self.weight.T).to(torch.promote_types(rows.dtype, torch.float32)).tanh().sum()


def window(step: int, number: int) -> torch.Tensor:
    return torch.randn(3, INPUT, generator=torch.Generator().manual_seed(10 * step + number)) / 20


def config(engine: str, precision: str, clip: float) -> RunConfig:
    return load(
        overrides=[
            *(f"engine.ds_config={engine}", f"engine.precision={precision}", f"optim.clip={clip}", "optim.lr=0.01"),
            *(f"train.steps={STEPS}", f"batch.global_size={WINDOWS}", "batch.micro_size=1", "optim.weight_decay=0"),
            # Far above the gradient's elements: the step is in proportion to them and shows how they were clipped.
            *("optim.eps=0.1", "data.sequence_length=16"),
        ]
    )


def in_float64(folder: str) -> list[float]:
    """The same steps by torch alone; leaves the parameters in the folder."""
    run, model, norms = config("zero0", "fp32", CLIP), Wide().double(), []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(run.optim.beta1, run.optim.beta2), eps=0.1, weight_decay=0.0
    )
    for step in range(STEPS):
        for number in range(WINDOWS):
            model(window(step, number).double(), 1 / WINDOWS).backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: p.detach() for name, p in model.named_parameters()}, Path(folder) / "parameters.pt")
    return norms


def train(tensor: int, engine: str, precision: str, clip: float, folder: str | None) -> tuple:
    """Norms of the steps; the first moments' norm behind the first; the last parameters' largest distance."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from pause_megatron.distributed import initialize
    from pause_megatron.train.run import new_engine

    run, norms, moments, copied = config(engine, precision, clip), [], math.nan, lambda rows: rows
    with initialize(ParallelSection(tensor=tensor)) as context:
        model = Wide(context.tp_rank, tensor)
        if tensor > 1:
            copied = copy_to_tensor_model_parallel_region
        groups = [{"params": [p], "weight_decay": 0.0} for p in model.parameters()]
        with new_engine(run, model, groups, context) as engine_:
            for step in range(STEPS if folder else 1):
                batches = [window(step, number) for number in range(context.dp_rank, WINDOWS, context.dp_size)]
                outcome = engine_.train_step(
                    batches, lambda module, rows, scale: module(rows, scale, copied), lr=0.01, global_targets=WINDOWS
                )
                assert outcome.applied
                norms.append(outcome.grad_norm)
                if step == 0:
                    moments = first_moments(engine_, context)
            apart = distance(engine_, context, Path(folder)) if folder else math.nan
    return norms, moments, apart


def first_moments(engine, context) -> float:
    """Their norm over all ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for address in engine.state.owned():
        if address.name == "weight" or context.tp_rank == 0:
            total += engine.state.get(address, "exp_avg").double().square().sum()
    torch.distributed.all_reduce(total)
    return float(total.sqrt())


def distance(engine, context, folder: Path) -> float:
    expected = torch.load(folder / "parameters.pt", mmap=True)
    share = expected["weight"].numel() // context.tp_size
    expected = {"bias": expected["bias"], "weight": expected["weight"].flatten()[share * context.tp_rank :][:share]}
    return max(
        float((engine.state.get(a, "param") - expected[a.name][a.start : a.start + a.numel]).abs().max())
        for a in engine.state.owned()
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[list[float], str]:
    folder = str(tmp_path_factory.mktemp("float64"))
    return run_on_ranks(1, in_float64, folder)[0], folder


@pytest.mark.parametrize("ranks", RANKS)
def test_norms_and_clipped_steps_are_those_of_float64(reference, ranks):
    norms, folder = reference
    assert min(norms) > 2 * CLIP
    world, tensor = RANKS[ranks]
    for engine in (*ENGINES, "zero3-offload") if world == 1 else ENGINES:
        for got, moments, apart in run_on_ranks(world, train, tensor, engine, "fp32", CLIP, folder):
            assert got == pytest.approx(norms, rel=5e-7), engine  # so within 1e-6 of each other
            assert moments == pytest.approx(0.1 * CLIP, rel=1e-6), engine
            assert apart < 1e-7, engine


@pytest.mark.parametrize("ranks", ["data parallel", "tensor parallel"])
def test_in_bf16_clipping_is_that_of_the_exact_norm(reference, ranks):
    """bf16 gradients differ from stage to stage; Adam's first moments tell what was left of them after clipping.

    Stages 2 and 3 have the optimizers that they have in fp32.
    """
    (first, *_), _ = reference
    world, tensor = RANKS[ranks]
    for engine in ENGINES[:2]:
        for (norm,), moments, _ in run_on_ranks(world, train, tensor, engine, "bf16", CLIP, None):
            assert norm == pytest.approx(first, rel=1e-2), engine
            assert moments == pytest.approx(0.1 * CLIP, rel=1e-6), engine
