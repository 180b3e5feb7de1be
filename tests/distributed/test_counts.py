"""The model on fake CUDA tensors: no operator mixes devices, and its kernels, bytes and FLOPs are those of `plan`.

Runs on a CPU. The real model goes forward and backward, alone and as rank 0 of two tensor-parallel ranks; a layer is
the difference of two layers and one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.counting import CUDA, META, Counting, Counts
from support.fake_cuda import TEXT_SIZE, Case
from support.ranks import with_tests_path
from support.tiny_config import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from pause_megatron.config.load import load
from pause_megatron.plan.kernel_work import Work
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.work import step_work

LARGE = ("model.preset=1b", "batch.micro_size=4", "batch.global_size=4")
SMALL = ("model.preset=130m", "batch.micro_size=16", "batch.global_size=16")
BOTH = ["plain"] + ["triton"] * bool(find_spec("triton"))
CASES = {
    "1b": (LARGE, 1, 0),
    "130m": (SMALL, 1, 0),
    "grouped queries, biases": ((*LARGE, "model.kv_heads=4", "model.qkv_bias=true"), 1, 0),
    "tensor parallel": ((*LARGE, "parallel.tensor=2"), 2, 0),
    "sequence parallel": ((*LARGE, "parallel.tensor=2", "parallel.sequence=true"), 2, 0),
    "recomputed": ((*LARGE, "parallel.recompute=full"), 1, 0),
    "documents apart": ((*LARGE, "data.intra_document_masking=true"), 1, 2),
    "documents apart, one window": (
        (*LARGE, "data.intra_document_masking=true", "batch.micro_size=1", "batch.global_size=1"),
        1,
        4,
    ),
    "like Qwen3": ((*LARGE, "model.head_dim=256", "model.kv_heads=8", "model.qk_norm=head"), 1, 0),
    "like OLMo 2": ((*LARGE, "model.qk_norm=whole", "model.norm=post"), 1, 0),
    "like OLMo 2, sequence parallel": (
        (*LARGE, "model.qk_norm=whole", "model.norm=post", "parallel.tensor=2", "parallel.sequence=true"),
        2,
        0,
    ),
    "like Qwen3, tensor parallel": ((*LARGE, "model.kv_heads=4", "model.qk_norm=head", "parallel.tensor=4"), 4, 0),
    "every bias, shared key/value heads": (
        (
            *LARGE,
            "model.kv_heads=2",
            "parallel.tensor=4",
            *(f"model.{name}_bias=true" for name in ("qkv", "proj", "mlp")),
        ),
        4,
        0,
    ),
    "sliding window": ((*LARGE, "model.sliding_window=256"), 1, 0),
    "tied, pauses out of the softmax": ((*SMALL, "model.tied=true", "pause.softmax=exclude"), 1, 0),
    "one chunk": ((*SMALL, "model.head_chunk=100000"), 1, 0),
    "one chunk, half of the rows": ((*SMALL, "model.head_chunk=100000", "pause.rate=0.5"), 1, 0),
}
FP32 = "fp32"


def keys(name: str, layers: int, kernels: str = "plain") -> tuple[str, ...]:
    return ("model.head_chunk=1024", *CASES[name][0], f"engine.kernels={kernels}", f"model.layers={layers}")


# Weights many, tokens few: the model's own work is next to nothing beside that of the optimizer.
ENGINE = (
    *tiny_model(layers=1, hidden=128, heads=4, tied=False),
    *("data.sequence_length=8", "batch.global_size=8", "batch.micro_size=1", "model.vocab_multiple=2048"),
)
ENGINES = {
    "stage 1": (8, ["engine.zero_stage=1"]),
    "stage 1, accumulation": (2, ["engine.zero_stage=1"]),
    "stage 1, one rank": (1, ["engine.zero_stage=1"]),
    "stage 0": (8, ["engine.zero_stage=0"]),
    "stage 0, fp32": (8, ["engine.zero_stage=0", "engine.precision=fp32"]),
    "stage 1, fp32": (4, ["engine.zero_stage=1", "engine.precision=fp32"]),
    "stage 2": (4, ["engine.zero_stage=2"]),
    "stage 3": (4, ["engine.zero_stage=3"]),
}


def run(script: str, cases: list[dict], output: Path) -> list:
    """What a program of tests/support answers to cases, in a process of its own."""
    command = [sys.executable, "-m", f"support.{script}", json.dumps(cases), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | with_tests_path()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def engine_bytes(tmp_path_factory) -> dict[str, int]:
    cases = [{"ranks": ranks, "overrides": [*ENGINE, *given], "bytes": True} for ranks, given in ENGINES.values()]
    return dict(zip(ENGINES, run("measured", cases, tmp_path_factory.mktemp("engine") / "bytes.json"), strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_and_optimizer_are_what_deepspeed_moves(engine_bytes, name):
    ranks, given = ENGINES[name]
    layout = Layout.of(load(overrides=[*ENGINE, *given]), ranks, 100)
    step = step_work(layout)
    assert (step.gradients + step.update).bytes == pytest.approx(engine_bytes[name], rel=0.05)


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> dict[tuple[str, str, int], Counts]:
    """Case, kernels, number of layers -> what was counted. One process: imports take longer than a case."""
    wanted = {
        (name, kernels, layers): Case(keys(name, layers, kernels), *CASES[name][1:])
        for name in CASES
        for kernels in BOTH
        for layers in (1, 2)
    }
    wanted[FP32, "plain", 1] = Case((*keys("1b", 1), "engine.precision=fp32"))
    answers = run("fake_cuda", [asdict(c) for c in wanted.values()], tmp_path_factory.mktemp("counts") / "c.json")
    return dict(zip(wanted, (Counts(**c) for c in answers), strict=True))


def layout(name: str, kernels: str = "plain") -> Layout:
    return Layout.of(load(overrides=list(keys(name, 1, kernels))), CASES[name][1], TEXT_SIZE)


def a_layer(counts: dict, name: str, kernels: str) -> Counts:
    return counts[name, kernels, 2] - counts[name, kernels, 1]


def assert_equal(work: Work, counted: Counts, *, bytes_within: float, kernels_within: float) -> None:
    assert work.products == counted.product_flops
    assert work.bytes == pytest.approx(counted.bytes, rel=bytes_within)
    assert work.kernels == pytest.approx(counted.kernels, rel=kernels_within)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_what_plan_says(counts, name, kernels):
    """Exactly; but where documents are apart, cosines and sines are picked by operators that `plan` leaves out.

    So are segments of a sliding window, and numbers of a token in norms over the heads of several ranks.
    """
    rounds = any(word in name for word in ("apart", "sliding", "OLMo 2, sequence"))
    texts = max(1, CASES[name][2])
    work, counted = step_work(layout(name, kernels)).layers, a_layer(counts, name, kernels)
    assert_equal(work, counted, bytes_within=0.001 if rounds else 0, kernels_within=0)
    # `plan` does not know the texts of a window and takes each for one.
    assert work.attention == counted.attention_flops * texts


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("name", CASES)
def test_embedding_and_head_are_what_plan_says(counts, name, kernels):
    """Within 1.5 % of the bytes: targets' own logits, masks and angles are left out. Kernels differ by versions."""
    step, layer = step_work(layout(name, kernels)), a_layer(counts, name, kernels)
    counted = counts[name, kernels, 1] - layer
    assert_equal(step.head + step.ends, counted, bytes_within=0.015, kernels_within=0.1)


@pytest.mark.parametrize(
    ("kernels", "size", "giga", "launches"),
    [("plain", "1b", 4.65, 72), ("plain", "130m", 6.93, 72), ("triton", "1b", 2.07, 33), ("triton", "130m", 3.09, 33)],
)
def test_bounds_of_a_layer(counts, kernels, size, giga, launches):
    """Bytes and kernels of a layer, forward and backward, held at their present values, so that a regression fails."""
    if kernels in BOTH:
        assert a_layer(counts, size, kernels).bytes <= giga * 1e9
        assert a_layer(counts, size, kernels).kernels <= launches


@pytest.mark.parametrize("kernels", BOTH)
def test_bytes_of_a_logit(counts, kernels):
    """Plain, each operator of the softmax reads and writes fp32; fused, a bf16 logit becomes its gradient."""
    whole, half = layout("one chunk"), layout("one chunk, half of the rows")
    logits = (whole.target_rows - half.target_rows) * whole.rows
    moved = counts["one chunk", kernels, 1].bytes - counts["one chunk, half of the rows", kernels, 1].bytes
    rows = 7 * 2 * (whole.target_rows - half.target_rows) * whole.model.hidden  # picked, put back, scaled
    expected = {"plain": 52, "triton": 4}[kernels]
    assert expected - 0.1 <= (moved - rows) / logits <= expected + 0.1


def test_fp32_runs_too(counts):
    assert counts[FP32, "plain", 1].product_flops == counts["1b", "plain", 1].product_flops


def test_the_counter():
    """Views and allocations are no kernels; every other operator reads its inputs and writes its outputs."""
    n = 64 * 32
    with FakeTensorMode(), Counting() as counting:
        made = torch.empty(64, 32, device=CUDA)
        made.view(32, 64).t()[1:]
        assert counting.counts == Counts()
        half = made.to(torch.bfloat16)
        made.add_(half)
        made + made[:1].expand(64, 32)
        half @ half.t()
    found = counting.counts
    assert found.operations["_to_copy"] == [1, (4 + 2) * n]
    assert found.operations["add_"] == [1, (4 + 4 + 2) * n]
    assert found.operations["add"] == [1, (4 + 4) * n + 4 * 32]
    assert found.product_flops == 2 * 64 * 64 * 32
    assert found.kernels == 4
    assert found.bytes == (6 + 10 + 8) * n + 4 * 32  # the product's are not among them


def test_the_counter_refuses_two_devices():
    with FakeTensorMode(), Counting():
        there, here = torch.empty(4, device=CUDA), torch.empty(4)
        with pytest.raises(RuntimeError, match=r"same device|two different devices"):
            there + here
        assert META != there.device == CUDA
