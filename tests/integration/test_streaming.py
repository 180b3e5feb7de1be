"""A run on data.source: read while training, resumed bit for bit, for every number of ranks and hosts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.namespaces import own_host_name
from support.prose import documents, small_tokenizer, write_shards
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.cli import main
from pause_megatron.data.prepare.run import prepare


def pretrain(overrides: list[str]) -> int:
    return main(["pretrain", *overrides])


def pretrain_on_its_own_machine(overrides: list[str]) -> int:
    """With another host name for each rank, so each of them reads. Only root may do that; others have one machine."""
    if os.geteuid() != 0:
        return pretrain(overrides)
    with own_host_name(f"machine-{os.environ.get('RANK', os.getpid())}"):
        return pretrain(overrides)


def _losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["text_tokens"]) for line in lines]


@pytest.mark.parametrize(("source", "masking"), [("shards", "false"), ("datasets", "true")])
def test_a_stream_resumes_from_a_checkpoint(tmp_path: Path, source: str, masking: str) -> None:
    tokenizer = small_tokenizer(tmp_path)
    shards = write_shards(tmp_path / "s", documents(60), 3)
    prepare([write_shards(tmp_path / "v", documents(80)[60:], 1)], tokenizer, tmp_path / "valid", workers=1)
    files = " ".join(map(str, sorted((tmp_path / "s").iterdir())))
    overrides = [
        f"data.source={shards if source == 'shards' else 'hf:json ' + files}",
        *(f"data.valid_prefix={tmp_path}/valid", f"data.tokenizer={tmp_path}/tok.model", "train.steps=6"),
        *tiny_model(layers=1, hidden=32, heads=2),
        "data.sequence_length=128",
        *("batch.global_size=8", "batch.micro_size=2", "validation.every=6", "validation.samples=4"),
        *("engine.precision=fp32", "model.vocab_multiple=32", "checkpoint.every=3", "log.tensorboard=false"),
        f"data.intra_document_masking={masking}",
    ]
    assert run_on_ranks(2, pretrain, [*overrides, f"run.dir={tmp_path}/whole"]) == [0, 0]
    whole = _losses(tmp_path / "whole")
    assert [step for step, *_ in whole] == [1, 2, 3, 4, 5, 6]
    for ranks, verb in ((2, pretrain_on_its_own_machine), (1, pretrain)):
        folder = tmp_path / f"again{ranks}"
        shutil.copytree(tmp_path / "whole", folder, symlinks=True)
        shutil.rmtree(folder / "checkpoints" / "step-00000006")
        (folder / "checkpoints" / "latest").unlink()
        assert run_on_ranks(ranks, verb, [*overrides, f"run.dir={folder}"]) == [0] * ranks
        again = _losses(folder)
        if ranks == 2:
            assert again == whole
        for (_, *one), (_, *two) in zip(again, whole, strict=True):
            assert one == pytest.approx(two, rel=1e-5)
