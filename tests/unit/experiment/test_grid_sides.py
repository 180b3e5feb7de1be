"""A grid whose models need a side array, or whose finetunings need values of answers: missing ones are refused, others
are in the fingerprint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.prose import documents, train_model, write_shards
from support.small_grid import GRID, write_grid, write_records

from pause_megatron.cli import main
from pause_megatron.data.corpus.side_writing import register_values
from pause_megatron.errors import DataError
from pause_megatron.experiment.grid import expand
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
    _check_values_of_answers(path, given, tmp_path / "answers.safetensors")


def _check_values_of_answers(path: Path, given: list[str], file: Path) -> None:
    """The content of `task.scores`, and not its path, is in the fingerprints of the finetunings."""
    keys = ["finetune.answer_placement=scored", f"task.scores={file}"]
    more = [f"finetune.set.{key}" for key in keys]
    with pytest.raises(DataError, match=r"answers\.safetensors: expected a file of `score --task`, got none"):
        read_inputs(load_grid(path, overrides=[*given, *more]))
    fingerprints = []
    for content, name in ((b"1", file), (b"2", file), (b"1", file.with_name("moved"))):
        name.write_bytes(content)
        grid = load_grid(path, overrides=[*given, *more[:1], f"finetune.set.task.scores={name}"])
        cells = expand(grid, read_inputs(grid)).cells
        fingerprints.append({cell.fingerprint for cell in cells if cell.verb == "finetune"})
    assert fingerprints[0] == fingerprints[2] and not fingerprints[0] & fingerprints[1]


def _tokens(prefix: str) -> int:
    from pause_megatron.data.corpus.manifest import CorpusManifest

    return CorpusManifest.load(prefix).counts.tokens
