"""The whole way, from text to an answer, in a home folder with an unusual name, and every path below `~`."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator

import pytest
from support.prose import documents
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.cli import main
from pause_megatron.config import load

SMALL = [
    *tiny_model(layers=1, hidden=32, heads=2),
    "data.sequence_length=64",
    *("train.steps=2", "batch.global_size=2", "batch.micro_size=2", "engine.precision=fp32", "validation.samples=2"),
    "data.split=80,20,0",
    *("validation.every=2", "model.vocab_multiple=32", "log.samples_every=1"),
]


def journey(home: str) -> tuple[list[int], list[str]]:
    """Runs verb after verb with paths below ~; returns their exit codes, and the prompts that `generate` read."""
    said = io.StringIO()
    prepare = ["prepare", "--input", "~/shards/0.jsonl", "--tokenizer", "~/tok.model", "--output", "~/data/c4 [1]"]
    generate = ["generate", "--model", "~/hf out", "--prompts-file", "~/prompts.txt", "--max-new-tokens", "2", "--json"]
    with _at_home(home):
        codes = [
            main(["train-tokenizer", "--input", "~/shards/*.jsonl", "--vocab-size", "400", "--output", "~/tok.model"]),
            main([*prepare, "--workers", "1"]),
            main(["verify", "~/data/c4 [1]", "--cache", "~/cache"]),
            main(["pretrain", "--config", "~/run.yaml", *SMALL]),
            main(["plot", "~/runs/a b", "--output", "~/loss.png"]),
            main(["export-hf", "~/runs/a b", "~/hf out"]),
            main(["import-hf", "~/hf out", "~/native"]),
        ]
        with contextlib.redirect_stdout(said):
            codes.append(main([*generate, "--pauses", "2"]))
    return codes, [completion["prompt"] for completion in json.loads(said.getvalue())["completions"]]


@contextlib.contextmanager
def _at_home(folder: str) -> Iterator[None]:
    before, home = os.getcwd(), os.environ.get("HOME", "/")
    os.environ["HOME"] = folder
    os.chdir(folder)
    try:
        yield
    finally:
        os.environ["HOME"] = home
        os.chdir(before)


@pytest.mark.parametrize("name", ['it\'s [a] "home" ~ é 日本 {x} $y #1 %d; -z'])
def test_from_text_to_an_answer_below_a_home_with_an_odd_name(tmp_path, name):
    home = tmp_path / name
    (home / "shards").mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in documents(60)]
    for number in range(2):
        (home / "shards" / f"{number}.jsonl").write_text("".join(lines[number::2]))
    (home / "data").mkdir()
    (home / "prompts.txt").write_bytes(b"\xef\xbb\xbffellow\xe2\x80\xa8citizens\r\n\na")
    (home / "run.yaml").write_text(
        "run:\n  dir: ~/runs/a b\ndata:\n  prefix: [1.0, '~/data/c4 [1]']\n  cache: ~/cache\n"
    )
    ((codes, prompts),) = run_on_ranks(1, journey, str(home))
    assert codes == [0] * 8
    assert prompts == ["fellow\u2028citizens", "a"]
    assert {path.name for path in home.iterdir() if path.name[0] != "."} == {
        *("shards", "data", "prompts.txt", "run.yaml", "tok.model", "cache", "runs", "loss.png", "hf out", "native")
    }
    assert load(home / "runs" / "a b" / "config.yaml").run.dir == f"{home}/runs/a b"
    assert not list(tmp_path.rglob("~"))
