"""A run on a blend, held-out corpora of its own: each corpus's loss, and their mean is the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.cli import main


def pretrain(overrides: list[str]) -> int:
    return main(["pretrain", *overrides])


def test_losses_of_a_blend_and_of_held_out_corpora(shards: Path, corpus: str, tmp_path: Path) -> None:
    tokenizer = str(shards / "tokenizer.model")
    prefixes = [corpus]
    for number in (1, 2, 3):
        source = str(sorted(shards.glob("c4-train.*"))[number])
        prefixes.append(str(tmp_path / f"english{number}"))
        prepare = ["prepare", "--input", source, "--tokenizer", tokenizer, "--output", prefixes[-1], "--workers", "1"]
        assert main(prepare) == 0
    overrides = [
        f"data.prefix=1 {prefixes[0]} 3 {prefixes[1]}",
        f"data.valid_prefix=1 {prefixes[2]} 1 {prefixes[3]}",
        *(f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache", "train.steps=3", "checkpoint.every=0"),
        *tiny_model(layers=1, hidden=32, heads=2),
        "data.sequence_length=64",
        *("batch.global_size=8", "batch.micro_size=2", "validation.every=3", "validation.samples=8"),
        *("engine.precision=fp32", "model.vocab_multiple=32"),
    ]
    assert run_on_ranks(2, pretrain, overrides) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # exact windows: each has as many targets as any other; 2 of 8 are of the first corpus
        first, second = line["loss/english"], line["loss/english1"]
        assert line["loss"] == pytest.approx((2 * first + 6 * second) / 8, rel=1e-6)
    valid = lines[-1]
    assert valid["valid_loss/english2"] != valid["valid_loss/english3"]
    mean = (valid["valid_loss/english2"] + valid["valid_loss/english3"]) / 2
    assert valid["valid_loss"] == pytest.approx(mean, rel=1e-6)
    assert len(list((tmp_path / "cache").glob("*.verified"))) == 4

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("loss_by_corpus/")}
    names = ("train_english", "train_english1", "valid_english2", "valid_english3")
    assert tags == {f"loss_by_corpus/{name}" for name in names}
