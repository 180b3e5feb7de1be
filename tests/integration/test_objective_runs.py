"""Runs with an objective: one list of values at every topology and ZeRO stage, and what an export states."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from support import parity_runs
from support.parity_runs import metrics
from support.ranks import run_on_ranks

from pause_megatron.hf.export import export
from pause_megatron.tasks.synthetic.base import write_tokenizer
from pause_megatron.train.guards.own_code import SOURCES

KINDS = {
    "cyb": ["objective=cyb_variational", "objective.z_loss=0.01", "finetune.pauses=0..4"],
    "anytime": [
        *("objective=anytime", "finetune.auxiliary_heads=true", "finetune.pauses=1..3"),
        "objective.token_weights=own_weights:weigh",
    ],
}
TOPOLOGIES = [
    (2, ["engine.zero_stage=1", "batch.micro_size=2"]),
    (2, ["engine.zero_stage=2"]),
    (2, ["engine.zero_stage=3", "batch.micro_size=1"]),
    (2, ["parallel.tensor=2", "parallel.sequence=true", "engine.zero_stage=3", "parallel.recompute=full"]),
]


SETTINGS = (
    *("train.steps=4", "batch.micro_size=4", "checkpoint.every=2", "pause.embeddings=2"),
    *("validation.every=2", "log.tensorboard=true"),
)


WEIGHTS = "import numpy as np\ndef weigh(ids): return np.where(ids == 2, 0.0, 1.5)\n"


def tune(folder: str, tokenizer: str, *overrides: str) -> int:
    sys.path.insert(0, tokenizer)  # where the weights are
    return parity_runs.tune(folder, tokenizer, *SETTINGS, *overrides)


def warnings_of(folder: str, tokenizer: str, *overrides: str) -> list[str]:
    """What a resume warns about."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = found.append
    logger = logging.getLogger("pause_megatron.train.run")  # a run replaces the handlers of the package's logger
    logger.addHandler(handler)
    try:
        assert tune(folder, tokenizer, *overrides) == 0
    finally:
        logger.removeHandler(handler)
    return [record.getMessage() for record in found]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "own_weights.py").write_text(WEIGHTS)
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
        assert not (tmp_path / "one" / "checkpoints" / "latest" / SOURCES).exists()
    else:
        (Path(tokenizer) / "own_weights.py").write_text(WEIGHTS.replace("1.5", "1.0"))
        [[line]] = run_on_ranks(1, warnings_of, str(tmp_path / "one"), tokenizer, *KINDS[kind])  # and has no step
        assert "expected the code of objective.token_weights=own_weights:weigh as the checkpoint was trained" in line
        assert re.search(r"got module own_weights: xxh3_128:\w+ in the checkpoint, xxh3_128:\w+ now", line)
