"""Whole runs that are small: real text, a real configuration, seconds each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from support.tiny_config import tiny_model
from wheels import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    # The suite interprets Triton's kernels, because a CPU cannot run them. Read when they are first imported.
    os.environ["TRITON_INTERPRET"] = "0"


def keys(corpus: str, folder: Path | str, *more: str) -> list[str]:
    """Keys of a run over a recipe: two layers, windows of 64 tokens whose numbers of pauses and of targets differ."""
    return [
        *(f"data.prefix={corpus}", f"run.dir={folder}", "train.steps=8", "engine.precision=fp32"),
        *tiny_model(layers=2, hidden=128, heads=4, kv_heads=2),
        *("model.tied=true", "data.sequence_length=64", "batch.global_size=8", "batch.micro_size=2"),
        *("pause.window=trim", "pause.placement=bernoulli", "pause.rate=0.3", "pause.embeddings=2"),
        *("optim.warmup_steps=2", "checkpoint.every=0", "validation.every=4", "validation.samples=8"),
        *("log.tensorboard=false", *more),
    ]


def program(verb: str, *arguments: str, seconds: float = 100.0) -> subprocess.CompletedProcess:
    """`pause-megatron VERB ...` as a user calls it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pause_megatron", verb, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    print(f"$ pause-megatron {verb} {' '.join(arguments)}\n{done.stdout}{done.stderr}", flush=True)
    return done


def environment() -> dict[str, str]:
    """That of this process, with the package and the tests' modules importable from any folder."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def furthest(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two lists."""
    return max(abs(one - two) / abs(two) for one, two in zip(found, expected, strict=True))
