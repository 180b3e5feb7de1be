"""`plan` against what training steps allocate and send: the real model, engine and sharding on fake ranks.

A fake process group lets one process be rank 0 of thousands: every collective is called with its real tensors and sends
nothing. Memory does not depend on the values.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.ranks import with_tests_path
from support.tiny_config import tiny_model

from pause_megatron.config.load import load
from pause_megatron.plan.communication import step_traffic
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.memory import rank_memory

TEXT_SIZE = 100  # of measured.py
PROCESSES = 2  # the cases are shared out among them
SMALL = (
    *tiny_model(layers=2, hidden=64, heads=4, tied=False),
    *("data.sequence_length=128", "batch.global_size=16", "batch.micro_size=2"),
)
QWEN3 = ("model.heads=4", "model.kv_heads=2", "model.head_dim=48", "model.qk_norm=head")
OLMO2 = ("model.qk_norm=whole", "model.norm=post")
SP = ("parallel.tensor=2", "parallel.sequence=true")
MEMORY = {
    "stage 0, bf16": (4, ["engine.zero_stage=0"]),
    "stage 0, fp32": (4, ["engine.zero_stage=0", "engine.precision=fp32"]),
    "stage 1, one micro-batch a step": (4, ["engine.zero_stage=1", "batch.micro_size=4", "model.layers=5"]),
    "stage 1, more weights than activations": (
        4,
        ["engine.zero_stage=1", "model.hidden=256", "batch.micro_size=1", "data.sequence_length=32"],
    ),
    "stage 1, a large vocabulary in chunks": (
        4,
        [
            *("engine.zero_stage=1", "model.layers=1", "data.sequence_length=256"),
            *("model.vocab_multiple=2048", "model.head_chunk=64"),
        ],
    ),
    "stage 1, a vocabulary wider than its chunks": (
        4,
        [
            *("engine.zero_stage=1", "model.layers=1", "model.hidden=256"),
            *("model.vocab_multiple=2048", "model.head_chunk=64"),
        ],
    ),
    "stage 1, a loss after every pause, a large vocabulary in chunks": (
        4,
        [
            *("engine.zero_stage=1", "model.layers=1", "data.sequence_length=256", "pause.rate=0.3"),
            *("model.vocab_multiple=2048", "model.head_chunk=64", "objective=anytime"),
        ],
    ),
    "stage 1, fp32, tensor parallel, Catch Your Breath and a z-loss, a large vocabulary in one chunk": (
        4,
        [
            *("engine.zero_stage=1", "engine.precision=fp32", "model.layers=1", "pause.rate=0.3"),
            *("model.vocab_multiple=2048", "parallel.tensor=2", "objective=cyb_budget", "objective.z_loss=0.1"),
        ],
    ),
    "stage 1, tensor parallel, grouped queries, documents apart": (
        8,
        [
            "engine.zero_stage=1",
            "parallel.tensor=2",
            "model.kv_heads=2",
            "model.layers=4",
            "data.intra_document_masking=true",
        ],
    ),
    "stage 1, tensor parallel, recomputed, tied": (
        4,
        ["engine.zero_stage=1", "parallel.tensor=2", "parallel.recompute=full", "model.tied=true", "model.layers=4"],
    ),
    "stage 1, fp32, a large vocabulary": (
        4,
        [
            *("engine.zero_stage=1", "engine.precision=fp32", "model.layers=1", "data.sequence_length=256"),
            *("model.vocab_multiple=32768", "model.head_chunk=512", "batch.micro_size=2"),
        ],
    ),
    "stage 1, gradients let go of at once": (
        4,
        ["engine.ds_config=DS/at_once.json", "engine.zero_stage=1", "model.hidden=256", "data.sequence_length=32"],
    ),
    "stage 1, sequence parallel, pauses without positions": (
        4,
        ["engine.zero_stage=1", *SP, "model.layers=4", "pause.positions=shared"],
    ),
    "stage 3, looped, recomputed, more weights than activations": (
        4,
        [
            *("engine.ds_config=DS/plain.json", "engine.zero_stage=3", "model.layers=4", "model.loops=2"),
            *("parallel.recompute=full", "data.sequence_length=32"),
        ],
    ),
    "stage 2, a range of layers looped": (
        4,
        [
            *("engine.ds_config=DS/plain.json", "engine.zero_stage=2", "model.layers=4"),
            *("model.loops=3", "model.loop_layers=1..2"),
        ],
    ),
    "stage 3, sequence parallel, recomputed": (
        8,
        ["engine.ds_config=DS/plain.json", "engine.zero_stage=3", *SP, "parallel.recompute=full", "model.layers=4"],
    ),
    "stage 3, offloaded": (4, ["engine.ds_config=DS/offload.json", "engine.zero_stage=3"]),
    "stage 1, tensor parallel, like Qwen3": (4, ["engine.zero_stage=1", "parallel.tensor=2", *QWEN3, "model.layers=4"]),
    "stage 1, like OLMo 2": (4, ["engine.zero_stage=1", *OLMO2, "model.layers=4"]),
    "stage 3, sequence parallel, like OLMo 2": (
        8,
        ["engine.ds_config=DS/plain.json", "engine.zero_stage=3", *SP, *OLMO2, "model.layers=4"],
    ),
    "stage 2, tensor parallel, shared key/value heads, every bias": (
        8,
        [
            *("engine.ds_config=DS/plain.json", "engine.zero_stage=2", "parallel.tensor=4", "model.kv_heads=2"),
            *("model.qkv_bias=true", "model.proj_bias=true", "model.mlp_bias=true", "model.layers=4"),
        ],
    ),
    "stage 1, sliding window": (
        4,
        ["engine.zero_stage=1", "model.qkv_bias=true", "model.sliding_window=32", "model.sliding_from=1"],
    ),
    "stage 1, sliding window, one window at a time, documents apart": (
        4,
        [
            *("engine.zero_stage=1", "model.sliding_window=32", "batch.micro_size=1", "data.sequence_length=256"),
            "data.intra_document_masking=true",
        ],
    ),
    "stage 2": (4, ["engine.ds_config=DS/plain.json", "engine.zero_stage=2"]),
    "stage 2, overlapped, gradients larger than a bucket, recomputed": (
        4,
        [
            *("engine.ds_config=DS/overlap.json", "engine.zero_stage=2", "model.hidden=256", "model.layers=4"),
            *("batch.micro_size=1", "parallel.recompute=full"),
        ],
    ),
    "stage 3": (4, ["engine.ds_config=DS/plain.json", "engine.zero_stage=3", "model.layers=6"]),
    "stage 3, recomputed, 16 ranks": (
        16,
        [
            *("engine.ds_config=DS/plain.json", "engine.zero_stage=3", "data.sequence_length=256"),
            *("batch.micro_size=1", "parallel.recompute=full"),
        ],
    ),
    "stage 3, little kept between passes": (
        4,
        ["engine.ds_config=DS/release.json", "engine.zero_stage=3", "model.layers=4", "data.sequence_length=32"],
    ),
}
RANKS = {
    "8 ranks, TP 4": (8, ["engine.zero_stage=1", "parallel.tensor=4", "model.qkv_bias=true"]),
    "128 ranks, TP 8, tied": (
        128,
        [
            *("engine.zero_stage=2", "parallel.tensor=8", "model.heads=8", "model.tied=true", "batch.micro_size=1"),
            "batch.global_size=64",
        ],
    ),
    "64 ranks, stage 3": (64, ["engine.zero_stage=3", "batch.global_size=128", "batch.micro_size=1"]),
}
HUGE = {
    "4096 ranks, stage 3": (4096, ["engine.zero_stage=3", "batch.global_size=4096", "batch.micro_size=1"]),
    "4096 ranks, TP 8, stage 1": (
        4096,
        [
            *("engine.zero_stage=1", "parallel.tensor=8", "model.heads=8", "batch.global_size=512"),
            "batch.micro_size=1",
        ],
    ),
}


@pytest.fixture(scope="module")
def ds(tmp_path_factory) -> Path:
    """Buckets as small beside these models as the shipped ones are beside real models."""
    folder = tmp_path_factory.mktemp("ds")
    for name, changes in {
        "plain": {},
        "overlap": {"overlap_comm": True},
        "offload": {name: {"device": "cpu", "pin_memory": False} for name in ("offload_optimizer", "offload_param")},
        "release": {"stage3_max_reuse_distance": 100_000, "stage3_prefetch_bucket_size": 0},
    }.items():
        zero = {"contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": 40_000} | changes
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    at_once = {"bf16": {"enabled": "auto", "immediate_grad_update": True}, "zero_optimization": {"stage": "auto"}}
    (folder / "at_once.json").write_text(json.dumps(at_once))
    return folder


def measure(cases: dict, ds: Path, output: Path, timeout: float = 550) -> dict[str, tuple[Layout, dict]]:
    listed = [{"ranks": ranks, "overrides": keys(given, ds)} for ranks, given in cases.values()]
    # oneDNN's kernels for newer instructions, and more threads, have temporaries: up to 5 % of so small a model.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"} | with_tests_path()

    def answers(part: int) -> list[dict]:
        file = output.with_suffix(f".{part}.json")
        command = [sys.executable, "-m", "support.measured", json.dumps(listed[part::PROCESSES]), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(file.read_text())

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(answers, range(PROCESSES)))
    layouts = [Layout.of(load(overrides=case["overrides"]), case["ranks"], TEXT_SIZE) for case in listed]
    ordered = [found[number % PROCESSES][number // PROCESSES] for number in range(len(listed))]
    return dict(zip(cases, zip(layouts, ordered, strict=True), strict=True))


def keys(given: list[str], ds: Path) -> list[str]:
    return [*SMALL, *(key.replace("DS", str(ds)) for key in given)]


@pytest.fixture(scope="module")
def measured(ds, tmp_path_factory) -> dict[str, tuple[Layout, dict]]:
    return measure(MEMORY | RANKS, ds, tmp_path_factory.mktemp("measured") / "answers.json")


def assert_sizes_and_traffic(layout: Layout, answer: dict) -> None:
    assert {p.name: list(p.shape) for p in layout.parameters} == answer["parameters"]
    assert [p.name for p in layout.parameters] == list(answer["parameters"])
    expected: Counter[str] = Counter()
    for sent in step_traffic(layout):
        expected[f"{sent.operation} {sent.ranks}"] += sent.bytes
    assert answer["traffic"] == expected


@pytest.mark.parametrize("name", MEMORY | RANKS)
def test_sizes_and_traffic_are_exact(measured, name):
    assert_sizes_and_traffic(*measured[name])


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_within_5_percent(measured, name):
    layout, answer = measured[name]
    predicted = rank_memory(layout, "cpu")
    host = predicted.host_bytes  # which is not another memory here
    assert predicted.peak_bytes + host == pytest.approx(answer["peak_bytes"], rel=0.05), predicted.phases
    assert predicted.built_bytes + host == pytest.approx(answer["built_bytes"], rel=0.002)


@pytest.mark.slow
def test_sizes_and_traffic_are_exact_on_4096_ranks(ds, tmp_path):
    for layout, answer in measure(HUGE, ds, tmp_path / "answers.json", timeout=550).values():
        assert_sizes_and_traffic(layout, answer)
