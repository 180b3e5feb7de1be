"""Finetunings of a tiny model on a synthetic task, and their metrics without times."""

from __future__ import annotations

import json
from pathlib import Path

from pause_megatron.config.load import load
from support.forked_ranks import TIMING
from support.tiny_config import tiny_model

TASK = "pause_megatron.tasks.synthetic.parity:PARITY_OF_8"


def tune(folder: str, tokenizer: str, *overrides: str) -> int:
    """Finetune on this rank; returns its exit code."""
    from pause_megatron.train.finetune import finetune

    settings = [
        *(f"run.dir={folder}", f"task.name={TASK}", f"data.tokenizer={tokenizer}", "data.sequence_length=48"),
        *tiny_model(layers=2, hidden=32, heads=4, tied=False),
        *("batch.global_size=8", "optim.lr=3e-3", "optim.warmup_steps=1"),
        *("engine.precision=fp32", "engine.zero_stage=0", "validation.samples=7"),
    ]
    return finetune(load(overrides=[*settings, *overrides]))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without times and without values that are not there."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING and value is not None} for line in lines]
