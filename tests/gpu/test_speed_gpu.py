"""`pause-megatron benchmark` on the real recipes, with and without fused kernels: MFU, memory beside the plan's."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import DEVICE

from pause_megatron.cli import main

FUSED, PLAIN, COMPILED, CHUNKED = "triton", "plain", "compiled", "triton, head_chunk=1024"
SETTINGS = {
    FUSED: ["engine.kernels=triton"],
    PLAIN: ["engine.kernels=plain"],
    CHUNKED: ["engine.kernels=triton", "model.head_chunk=1024"],
    COMPILED: ["engine.kernels=compiled"],
}
if DEVICE == "cuda":
    # Micro-batches are the recipes' own; two of them make a step.
    RECIPES = {"c4-130m-pause": ["batch.global_size=32"], "c4-1b-pause": ["batch.global_size=8"]}
    STEPS = ["--steps", "6", "--warmup", "3"]
else:
    RECIPES = {"tiny-pause": ["data.sequence_length=64", "batch.global_size=8"]}
    STEPS = ["--steps", "2", "--warmup", "1", "--vocab-size", "1000"]
# In this order: what is worth most first.
CASES = [(recipe, name) for name in SETTINGS for recipe in RECIPES]

found: dict[tuple[str, str], dict] = {}


@pytest.fixture(autouse=True)
def _room() -> Iterator[None]:
    yield
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("recipe", "name"), CASES, ids=lambda value: value)
def test_benchmark(recipe, name, tmp_path, figures, request):
    if DEVICE == "cpu" and name != PLAIN:
        request.getfixturevalue("cuda")
    file = tmp_path / "benchmark.json"
    assert main(["benchmark", "--recipe", recipe, *RECIPES[recipe], *SETTINGS[name], *STEPS, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["format"] == "pause-megatron benchmark" and record["machine"]["device"] == DEVICE
    found[recipe, name] = record
    figures(**record)
    memory, waits = record["memory"], record["host_waits"]
    peak, planned = memory["peak_bytes"], memory["planned_bytes"]
    mfu = "MFU unknown" if record["mfu"] is None else f"MFU {record['mfu']:.1%}"
    figures.line(
        f"speed: {recipe} {name}: {record['step_seconds']['median']:.3f} s/step, "
        f"{record['raw_tokens_per_second']:,.0f} tokens/s, {mfu}, peak {peak / 2**30:.2f} GiB of {planned / 2**30:.2f} "
        f"planned, waits {waits['per_micro_batch']:g} a micro-batch, {waits['per_step']:g} a step"
    )
    for kernel in record["top_kernels"][:4] if name == FUSED else []:
        figures.line(f"speed:   {kernel['share']:.1%} {kernel['name'][:70]}")
    if DEVICE == "cuda":
        assert record["mfu"] is not None
        assert 0.95 < peak / planned < 1.08, f"{peak:,} bytes, planned {planned:,}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_kernels_are_faster(recipe, cuda, figures):
    times = {name: found[recipe, name]["step_seconds"]["median"] for name in SETTINGS if (recipe, name) in found}
    best = min(times, key=times.__getitem__)
    figures(times=times, best=best)
    if folder := os.environ.get("GPU_CHECK_OUTPUT"):
        file = Path(folder) / f"benchmark-{recipe.split('-')[1]}.json"
        file.write_text(json.dumps(found[recipe, best], indent=1) + "\n")
    assert times[FUSED] < times[PLAIN], times
