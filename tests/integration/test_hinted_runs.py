"""Finetuning on hints: one loss list at every topology, resume, a second finetuning, and an export that is plain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import parity_runs
from support.parity_runs import metrics
from support.ranks import run_on_ranks

from pause_megatron.checkpoint import Store
from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.hf.export import export
from pause_megatron.tasks.synthetic.base import write_tokenizer

PLACES = {
    "pauses": ["finetune.pause_targets=true", "finetune.pauses=9..11", "pause.embeddings=9"],
    "heads": ["finetune.auxiliary_heads=true", "finetune.pauses=0", "pause.embeddings=9"],
}
HEADS = "auxiliary_heads.weight"


SETTINGS = (
    *("train.steps=6", "batch.micro_size=8", "checkpoint.every=0", "log.tensorboard=false"),
    *("validation.every=3", "finetune.hint_weight=0.5"),
)


def tune(folder: str, tokenizer: str, *overrides: str) -> int:
    return parity_runs.tune(folder, tokenizer, *SETTINGS, *overrides)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module", params=PLACES)
def reference(request, tokenizer, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run on one rank without ZeRO, and its place of hints."""
    folder, place = tmp_path_factory.mktemp(request.param) / "run", PLACES[request.param]
    assert run_on_ranks(1, tune, str(folder), tokenizer, *place, "checkpoint.every=3", "checkpoint.keep=9") == [0]
    return folder, place


def test_hints_and_answers_are_logged_apart(reference):
    lines = metrics(reference[0])
    assert all(line["hint_targets"] == 4 * line["targets"] for line in lines)  # 8 hints; one digit and the end
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["loss_hints"] < lines[0]["loss_hints"]
    assert [line["step"] for line in lines if line.get("valid_loss_hints")] == [3, 6]


@pytest.mark.parametrize("ranks,tensor,sequence,zero", [(2, 1, "false", 3), (2, 2, "true", 1)])
def test_one_loss_list(reference, tokenizer, tmp_path, ranks, tensor, sequence, zero):
    folder, place = reference
    topology = [f"parallel.tensor={tensor}", f"parallel.sequence={sequence}", f"engine.zero_stage={zero}"]
    settings = [*place, *topology, "batch.micro_size=2"]
    assert run_on_ranks(ranks, tune, str(tmp_path / "run"), tokenizer, *settings) == [0] * ranks
    for line, expected in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert line == pytest.approx(expected, rel=1e-4), topology


def test_a_resumed_run_is_the_uninterrupted_one(reference, tokenizer, tmp_path):
    folder, place = reference
    shutil.copytree(folder, tmp_path / "run", symlinks=True)
    shutil.rmtree(Store(tmp_path / "run" / "checkpoints").path(6))
    settings = [*place, "checkpoint.every=3", "checkpoint.keep=9"]
    assert run_on_ranks(1, tune, str(tmp_path / "run"), tokenizer, *settings) == [0]
    assert metrics(tmp_path / "run") == metrics(folder)


def test_an_export_has_no_heads_and_the_next_finetuning_new_ones(reference, tokenizer, tmp_path):
    folder, place = reference
    exported = export(folder, tmp_path / "hf")  # compares its logits with those of the native model
    assert exported.parity.largest_difference <= exported.parity.tolerance
    record = json.loads((tmp_path / "hf" / "config.json").read_text())["pause"]
    used = place[0].removeprefix("finetune.").removesuffix("=true")
    assert [name for name in ("pause_targets", "auxiliary_heads") if record.get(name)] == [used]
    saved = Manifest.load(Store(folder / "checkpoints").path(6)).parameters
    assert (HEADS in saved) == (used == "auxiliary_heads")
    for next_place in PLACES.values() if used == "auxiliary_heads" else [PLACES["heads"]]:
        after = tmp_path / next_place[0]
        settings = [*next_place, f"model.from={folder}", "train.steps=1", "optim.warmup_steps=0", "validation.every=0"]
        assert run_on_ranks(1, tune, str(after), tokenizer, *settings) == [0]
        names = Manifest.load(Store(after / "checkpoints").path(1)).parameters
        assert names.keys() - {HEADS} == saved.keys() - {HEADS} and (HEADS in names) == (next_place is PLACES["heads"])
