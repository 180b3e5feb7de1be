"""A corpus of Megatron-LM's, adopted, trains as the same documents do when `prepare` made the corpus."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from support.megatron_corpora import megatron_tokenizer, preprocess
from support.prose import train_hugging_face
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.cli import main


def pretrain(overrides: list[str]) -> int:
    return main(["pretrain", *overrides])


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_losses_are_those_of_the_prepared_corpus(shards: Path, corpus: str, tmp_path: Path, kind: str) -> None:
    source = sorted(shards.glob("c4-train.*"))[0]
    if kind == "sentencepiece":
        tokenizer, prepared = shards / "tokenizer.model", corpus
    else:
        tokenizer, prepared = train_hugging_face(tmp_path / "hf"), str(tmp_path / "ours" / "english")
        prepare = ["prepare", "--input", str(source), "--tokenizer", str(tokenizer), "--output", prepared]
        assert main([*prepare, "--workers", "1"]) == 0
    with gzip.open(source, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    # The same name, because pauses are keyed by it.
    adopted = str(preprocess(tmp_path / "theirs" / "english", texts, *megatron_tokenizer(tokenizer)))
    assert main(["adopt", adopted, "--tokenizer", str(tokenizer), "--cache", f"{tmp_path}/cache"]) == 0
    assert main(["verify", adopted, "--cache", f"{tmp_path}/cache"]) == 0

    found = []
    for prefix in (prepared, adopted):
        overrides = [
            *(f"data.prefix={prefix}", f"run.dir={tmp_path}/run{len(found)}", f"data.cache={tmp_path}/cache"),
            *("train.steps=2", "checkpoint.every=0", "optim.warmup_steps=1", "data.sequence_length=64"),
            *tiny_model(layers=1, hidden=32, heads=2),
            "batch.global_size=8",
            *("batch.micro_size=2", "validation.every=2", "validation.samples=8", "engine.precision=fp32"),
            "model.vocab_multiple=32",
        ]
        assert run_on_ranks(1, pretrain, overrides) == [0]
        lines = (tmp_path / f"run{len(found)}" / "metrics.jsonl").read_text().splitlines()
        names = ("loss", "loss_after_pause", "grad_norm", "valid_loss", "valid_loss_without_pauses")
        found.append([{name: line.get(name) for name in names} for line in map(json.loads, lines)])
    assert len(found[0]) >= 2 and found[0] == found[1]
