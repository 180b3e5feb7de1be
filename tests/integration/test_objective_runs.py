"""Runs with an objective: one list of values at every topology and ZeRO stage, resume, and what an export states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.forked_ranks import TIMING
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.config.load import load
from pause_megatron.hf.export import export
from pause_megatron.tasks.synthetic.base import write_tokenizer

TASK = "pause_megatron.tasks.synthetic.parity:PARITY_OF_8"
KINDS = {
    "cyb": ["objective=cyb_variational", "objective.z_loss=0.01", "finetune.pauses=0..4"],
    "anytime": ["objective=anytime", "finetune.auxiliary_heads=true", "finetune.pauses=1..3"],
}
TOPOLOGIES = [
    (2, ["engine.zero_stage=1", "batch.micro_size=2"]),
    (2, ["engine.zero_stage=2"]),
    (2, ["engine.zero_stage=3", "batch.micro_size=1"]),
    (2, ["parallel.tensor=2", "parallel.sequence=true", "engine.zero_stage=3", "parallel.recompute=full"]),
]


def tune(folder: str, tokenizer: str, *overrides: str) -> int:
    from pause_megatron.train.finetune import finetune

    settings = [
        *(f"run.dir={folder}", f"task.name={TASK}", f"data.tokenizer={tokenizer}", "data.sequence_length=48"),
        *tiny_model(layers=2, hidden=32, heads=4, tied=False),
        *("train.steps=4", "batch.global_size=8", "batch.micro_size=4", "optim.lr=3e-3", "optim.warmup_steps=1"),
        *("engine.precision=fp32", "engine.zero_stage=0", "checkpoint.every=2", "pause.embeddings=2"),
        *("validation.every=2", "validation.samples=7", "log.tensorboard=true"),
    ]
    return finetune(load(overrides=[*settings, *overrides]))


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING and value is not None} for line in lines]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_one_list_of_values(kind, tokenizer, tmp_path):
    assert run_on_ranks(1, tune, str(tmp_path / "one"), tokenizer, *KINDS[kind]) == [0]
    expected = metrics(tmp_path / "one")
    names = {"cyb": {"requested_steps", "request_probability", "z_loss"}, "anytime": {"loss_step_0", "loss_step_1"}}
    for prefix, line in (("", expected[0]), ("valid_", expected[1])):
        assert {f"{prefix}objective", *(f"{prefix}objective/{name}" for name in names[kind])} <= line.keys()
    assert expected[-1]["objective"] < expected[0]["objective"]
    for number, (ranks, changes) in enumerate(TOPOLOGIES):
        folder = tmp_path / str(number)
        assert run_on_ranks(ranks, tune, str(folder), tokenizer, *KINDS[kind], *changes) == [0] * ranks
        for line, wanted in zip(metrics(folder), expected, strict=True):
            assert line == pytest.approx(wanted, rel=2e-5), changes
    if kind == "cyb":
        export(tmp_path / "one", tmp_path / "hf")
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["pause"]["requests"] == 4
