"""The change that data/README.md gives for Megatron-LM's scripts, applied to a script of each generation and run.

Two ranks, tensor parallel. The script is ours, the surroundings stand in for a checkout (see both modules); tokenizers,
data sets, builder, embedding and model are those of the installed megatron-core.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import pytest
from support.corpora import ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus
from support.megatron_scripts import GENERATIONS, write_scripts
from support.megatron_tokenizers import build_tokenizer, exported_folder, tokenizer_arguments
from support.prose import documents, train_model

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "pause_megatron" / "data" / "README.md"
EOD = 2  # </s> of the SentencePiece model; the legacy class of 0.16 would say 602
PIECES = 600
MINOR = int(megatron.core.__version__.split(".")[1])


# Wheels of 0.17 and 0.18 have a `megatron.training` too; that of 0.19 is the first whose model is made from arguments.
IS_RELEASED = MINOR >= 19 and importlib.util.find_spec("megatron.training") is not None
RELEASED_ARGUMENTS = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --train-iters 4 --eval-iters 1 --lr 1e-3 --transformer-impl local --split 8,2,0 "
    "--tokenizer-type SentencePieceTokenizer --padded-vocab-size 608 --distributed-backend gloo --eod-mask-loss "
    "--use-cpu-initialization --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion "
    "--no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion"
)


def blocks(language: str, beginning: str) -> list[str]:
    """The README's blocks of a language that begin so."""
    found = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in found if block.startswith(beginning)]


def patch(script: str, diff: str) -> str:
    """Apply a unified diff: each hunk must stand in the script, once, and be as long as its header says."""
    for hunk in re.split(r"^(?=@@)", diff, flags=re.MULTILINE)[1:]:
        header, *lines = hunk.splitlines()
        before = [line[1:] for line in lines if not line.startswith("+")]
        after = [line[1:] for line in lines if not line.startswith("-")]
        sizes = re.fullmatch(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", header)
        assert sizes and [*map(int, sizes.groups())] == [len(before), len(after)], header
        old, new = ("".join(line + "\n" for line in lines) for lines in (before, after))
        assert script.count(old) == 1, hunk
        script = script.replace(old, new)
    return script


def write_text_corpus(folder: Path, tokenizer: Any) -> str:
    """Speeches, as preprocess_data.py writes them: ids and EOD."""
    return write_corpus(folder / "speeches", [np.array([*tokenizer.tokenize(t), tokenizer.eod]) for t in documents(30)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the scripts of all generations did, one after the other in one pair of processes."""
    folder = tmp_path_factory.mktemp("megatron")
    model = train_model(folder / "tok.model")
    arguments = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}
    corpus = write_text_corpus(folder, build_tokenizer(tokenizer_arguments(**arguments)))
    hf = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(exported_folder(folder / "model"))}
    common = {"data_path": [corpus], "data_cache_path": str(folder / "cache"), "reset_position_ids": True}
    common |= {"reset_attention_mask": True, "eod_mask_loss": True, "padded_vocab_size": 608, **arguments}
    options = {"mmap_bin_files": False, "mid_level_dataset_surplus": 0.25, "num_dataset_builder_threads": 2}
    options |= {"full_validation": True}
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for generation in GENERATIONS:
        for name in (generation, f"{generation} PauseGPTModel"):
            cases[name] = (generation, {**common, **options})
        cases[f"{generation} stock"] = (generation, {**common, **options, "train_iters": 0})
        cases[f"{generation} few rows"] = (generation, {**common, "padded_vocab_size": 600})
    cases["0.16 rows of its own"] = ("0.16", {**common, "padded_vocab_size": None})
    cases["0.17 --make-vocab-size-divisible-by"] = (
        "0.17",
        {**common, "padded_vocab_size": None, "make_vocab_size_divisible_by": 100},
    )
    cases["0.19 exported"] = ("0.19", {**common, **hf})
    cases["0.19 mock"] = ("0.19", {**common, "mock_data": True, "data_path": None, "data_cache_path": None})
    for name, (generation, _) in cases.items():
        write_scripts(folder / name.replace(" ", "-"), generation)
        if "stock" not in name:
            _change(folder / name.replace(" ", "-"), generation, model="PauseGPTModel" in name)
    (folder / "cases.json").write_text(json.dumps(cases))
    if IS_RELEASED:
        write_scripts(folder / "real", "0.19")
        _change(folder / "real", "0.19", model=False)
        words = [*RELEASED_ARGUMENTS.split(), "--tokenizer-model", str(model), "--data-path", corpus]
        (folder / "real.json").write_text(json.dumps(words))
    return _run(folder)


def _change(scripts: Path, generation: str, model: bool) -> None:
    """Change a generation's scripts as the README says, with PauseGPTModel or without."""
    pauses, provider = blocks("diff", "--- a/pretrain_gpt.py")
    script = patch((scripts / "pretrain_gpt.py").read_text(), pauses)
    if model:
        (builder,) = blocks("python", "# gpt_builders.py")
        line = "from megatron.core.models.gpt import GPTModel\n"
        builders = (scripts / "gpt_builders.py").read_text()
        assert builders.count(line) == 1 and builder.startswith(f"# gpt_builders.py, in place of: {line}")
        (scripts / "gpt_builders.py").write_text(builders.replace(line, builder))
        if generation == "0.19":
            script = patch(script, provider)
    (scripts / "pretrain_gpt.py").write_text(script)


def _run(folder: Path) -> list[dict[str, Any]]:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "megatron_surroundings.py"), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(2)]


def outcome(runs: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a script did on both ranks; only the first has data sets."""
    first, second = (rank[name] for rank in runs)
    assert "error" not in first, first["traceback"]
    assert first["losses"] == pytest.approx(second["losses"])
    return first, second


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_readmes_lines(runs: list[dict[str, Any]], generation: str) -> None:
    """Its tokenizer's EOD and the first free id; resets and masks at EOD; rows for all; every option as before."""
    found, other = outcome(runs, generation)
    stock, _ = outcome(runs, f"{generation} stock")
    assert (found["class"], stock["class"]) == ("PauseGPTDataset", "GPTDataset")
    assert (found["eod"], found["pause_ids"], found["rows"]) == (EOD, [PIECES], 608)
    assert stock["eod"] == EOD and found["options"] == stock["options"]
    assert found["options"]["mmap_bin_files"] is False and found["options"]["num_dataset_builder_threads"] == 2
    resets = 0
    for sample in found["samples"]:
        tokens, labels, mask, positions = (
            np.array(sample[name]) for name in ("tokens", "labels", "loss_mask", "position_ids")
        )
        assert (tokens == PIECES).sum() in (5, 6) and (labels != PIECES).all()
        assert not mask[:-1][tokens[1:] == PIECES].any()
        # Text behind an EOD: unsupervised, and position 0, however many pauses stand between.
        text = np.flatnonzero(tokens != PIECES)
        begins = text[1:][tokens[text[:-1]] == EOD]
        assert (positions[begins] == 0).all() and (np.flatnonzero(positions == 0).tolist() == [0, *begins])
        assert not mask[begins - 1].any()
        resets += begins.size
    assert resets > 0
    assert found["losses"][-1] < found["losses"][0] < 7
    # Each rank holds half of the rows; pauses are in the second's.
    assert found["rank_rows"] + other["rank_rows"] == [0, 304, 304, 608]
    assert other["moved"][PIECES - 304] > 0


@pytest.mark.parametrize("generation", GENERATIONS)
def test_too_few_rows_are_refused(runs: list[dict[str, Any]], generation: str) -> None:
    """On every rank, before a step."""
    for rank in runs:
        error = rank[f"{generation} few rows"]["error"]
        assert error.startswith("ConfigError: model_vocab_size: expected 601 or more") and "got 600" in error


@pytest.mark.parametrize("generation", GENERATIONS)
def test_our_model_in_their_builder(runs: list[dict[str, Any]], generation: str) -> None:
    """The same data; at the first step, where all logits are nearly alike, the padding rows' share less of a loss."""
    ours, other = outcome(runs, f"{generation} PauseGPTModel")
    theirs, _ = outcome(runs, generation)
    assert ours["samples"] == theirs["samples"] and ours["rows"] == 608
    assert theirs["losses"][0] - ours["losses"][0] == pytest.approx(math.log(608 / 601), rel=0.2)
    assert ours["losses"][-1] < ours["losses"][0]
    assert other["moved"][PIECES - 304] > 0


def test_rows_that_are_not_given(runs: list[dict[str, Any]]) -> None:
    """0.16 counts its legacy tokenizer's, later ones the tokenizer's, up to the multiple: 600 is one of 200."""
    assert outcome(runs, "0.16 rows of its own")[0]["rows"] == 768
    error = runs[0]["0.17 --make-vocab-size-divisible-by"]["error"]
    assert "expected 601 or more" in error and "got 600" in error


def test_an_exported_tokenizer_and_mock_data(runs: list[dict[str, Any]]) -> None:
    """Its learned row; and the data sets of other options, which have no pauses."""
    exported, _ = outcome(runs, "0.19 exported")
    assert (exported["eod"], exported["pause_ids"]) == (EOD, [PIECES])
    mock, _ = outcome(runs, "0.19 mock")
    assert mock["class"] == "MockGPTDataset" and mock["options"]["mock"] is True


def test_the_installed_releases_own_arguments(runs: list[dict[str, Any]]) -> None:
    """Where the wheel has them: `--padded-vocab-size` becomes the model's rows, and what the data set compares."""
    assert (MINOR >= 19) == IS_RELEASED
    for rank in runs if IS_RELEASED else []:
        found = rank["real"]
        assert (found["rows"], found["given"], found["pause_ids"]) == (608, 608, [PIECES])
        assert found["class"] == "PauseGPTDataset" and found["pauses"] in (5, 6)
        assert found["error"].startswith("ConfigError: model_vocab_size: expected 601 or more")


def test_nothing_else_is_imported(runs: list[dict[str, Any]]) -> None:
    """DeepSpeed, and the parts of this project that train."""
    top = {name.split(".")[0] for name in runs[0]["modules"]}
    assert "deepspeed" not in top and "pause_megatron" in top
    assert not [
        name for name in runs[0]["modules"] if name.startswith(("pause_megatron.engine", "pause_megatron.train"))
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "speeches", paragraphs(40))


def test_the_readmes_policy(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [each for each in blocks("python", "# my_policies.py") if "def after_punctuation" in each]
    (tmp_path / "my_policies.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for window in ("exact", "trim"):
        config = make_config(corpus, 256, pause_placement="my_policies:after_punctuation", pause_window=window)
        dataset = make_dataset(corpus, config, 20)
        stops = 0
        for number in range(20):
            tokens = dataset[number]["tokens"].numpy()
            is_stop = np.isin(tokens[:-1], [33, 46, 63])
            assert (tokens[1:][is_stop] == ByteTokenizer.pause_id).all()
            assert (tokens == ByteTokenizer.pause_id).sum() >= 20
            stops += is_stop.sum()
        assert stops > 10
