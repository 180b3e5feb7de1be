"""A grid whose models need a side array: missing ones are refused with the command, others are in the fingerprint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.prose import documents, train_model, write_shards
from support.small_grid import GRID, write_grid, write_records

from pause_megatron.cli import main
from pause_megatron.data.corpus.side_writing import register_values
from pause_megatron.errors import DataError
from pause_megatron.experiment.inputs import read_inputs
from pause_megatron.experiment.load import load_grid


def prepared(folder: Path) -> str:
    """A small corpus of real text."""
    write_shards(folder / "shards", documents(8), 1)
    tokenizer = train_model(folder / "t.model")
    arguments = ["--input", str(folder / "shards" / "*.gz"), "--tokenizer", str(tokenizer), "--workers", "1"]
    assert main(["prepare", *arguments, "--output", str(folder / "text")]) == 0
    return str(folder / "text")


def test_a_missing_side_array_is_refused_with_the_command(tmp_path):
    prefix = prepared(tmp_path)
    path = write_grid(tmp_path / "grid.yaml", GRID)
    more = ["models.DIT.recipe=tiny-dit", "variants.DIT.model=DIT", "variants.DIT.finetune=pauses"]
    records = write_records(tmp_path / "records")
    given = [f"data.prefix={prefix}", f"data.tasks={records}"]
    assert read_inputs(load_grid(path, overrides=given)).sides == {}
    grid = load_grid(path, overrides=[*more, *given])
    with pytest.raises(DataError) as caught:
        read_inputs(grid)
    assert "models.DIT: data.side=loss: " in str(caught.value)
    assert f"`pause-megatron score {prefix} --name loss --model FOLDER`" in str(caught.value)
    tokens = np.zeros(_tokens(prefix), dtype=np.float32)
    np.save(tmp_path / "values.npy", tokens)
    register_values(str(prefix), "loss", tmp_path / "values.npy", overwrite=False)
    assert set(read_inputs(grid).sides) == {"loss"}


def _tokens(prefix: str) -> int:
    from pause_megatron.data.corpus.manifest import CorpusManifest

    return CorpusManifest.load(prefix).counts.tokens
