"""Bad input to `pretrain`: the one message that it gets, before any training starts."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
import signal
from pathlib import Path

import pytest
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.cli import main

SMALL = [
    *tiny_model(layers=1, hidden=32, heads=2, tied=True),
    *("data.sequence_length=32", "batch.global_size=4", "batch.micro_size=2", "optim.warmup_steps=1"),
    *("train.steps=2", "validation.every=0", "log.tensorboard=false", "checkpoint.every=1"),
]


def pretrain(*overrides: str, file_limit: int | None = None) -> tuple[int, str]:
    """Exit code and standard error of `pause-megatron pretrain` on one rank of a pool."""
    text = io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, hard))
    try:
        with contextlib.redirect_stderr(text):
            code = main(["pretrain", "--recipe", "tiny-pause", *SMALL, *overrides])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    return code, text.getvalue()


@pytest.fixture
def copy(corpus: str, tmp_path: Path) -> str:
    """A copy of the corpus that a test may damage."""
    for path in Path(corpus).parent.glob("english.*"):
        target = tmp_path / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return str(tmp_path / "english")


@pytest.fixture(scope="module")
def other_tokenizer(shards: Path, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("other") / "other.model")
    one = str(next(iter(sorted(shards.glob("c4-train.*")))))
    assert main(["train-tokenizer", "--input", one, "--vocab-size", "600", "--output", path]) == 0
    return path


def refused(ranks: int, *overrides: str) -> str:
    """The message on rank 0, after checking that every rank refused."""
    results = run_on_ranks(ranks, pretrain, *overrides)
    assert [code for code, _ in results] == [2] * ranks
    assert "Traceback" not in results[0][1]
    return results[0][1]


def test_a_corpus_that_is_not_there(tmp_path):
    message = refused(1, f"data.prefix={tmp_path}/nothing", f"run.dir={tmp_path}/run")
    assert f"no corpus at {tmp_path}/nothing" in message and "pause-megatron prepare" in message


def test_no_corpus_named(tmp_path):
    assert "data.prefix: expected the prefix of a prepared corpus" in refused(1, f"run.dir={tmp_path}/run")


def test_a_bin_shorter_than_its_index(copy, tmp_path):
    path = Path(f"{copy}.bin")
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(1, f"data.prefix={copy}", f"run.dir={tmp_path}/run")
    assert f"{path}: expected " in message and " bytes, the size in english.idx, got " in message


def test_another_tokenizer_than_the_corpus_was_prepared_with(corpus, other_tokenizer, tmp_path):
    message = refused(1, f"data.prefix={corpus}", f"data.tokenizer={other_tokenizer}", f"run.dir={tmp_path}/run")
    assert "expected its tokenizer sentencepiece:" in message and "(600 ids)" in message


@pytest.mark.parametrize(("pause_id", "role"), [(2, "EOD"), (0, "UNK")])
def test_a_pause_id_that_is_taken(shards, tmp_path, capsys, pause_id, role):
    arguments = ["--input", str(shards / "c4-train.*"), "--tokenizer", str(shards / "tokenizer.model")]
    code = main(["prepare", *arguments, "--output", str(tmp_path / "out"), "--pause-id", str(pause_id)])
    assert code == 2
    assert f"got {pause_id}, the tokenizer's {role} id" in capsys.readouterr().err


def test_a_global_batch_that_does_not_divide(corpus, tmp_path):
    message = refused(2, f"data.prefix={corpus}", f"run.dir={tmp_path}/run", "batch.global_size=6")
    assert "batch.global_size: expected a multiple of batch.micro_size (2) x data-parallel ranks" in message
    assert "got 6. Nearest: 4 or 8" in message


def test_more_tensor_parallel_ranks_than_ranks(corpus, tmp_path):
    message = refused(1, f"data.prefix={corpus}", f"run.dir={tmp_path}/run", "parallel.tensor=2")
    assert "parallel.tensor: expected" in message and "number of ranks" in message and "2" in message


def test_a_sequence_length_that_sequence_parallelism_does_not_divide(corpus, tmp_path):
    keys = ["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=33"]
    message = refused(2, f"data.prefix={corpus}", f"run.dir={tmp_path}/run", *keys)
    assert "data.sequence_length" in message and "33" in message and "parallel.tensor" in message


def test_a_checkpoint_of_another_configuration(corpus, tmp_path):
    keys = [f"data.prefix={corpus}", f"run.dir={tmp_path}/run"]
    assert run_on_ranks(1, pretrain, *keys)[0][0] == 0
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    message = refused(1, *keys, "pause.rate=0.2", "optim.lr=0.5", "log.every=2")
    assert "the checkpoint has another configuration" in message
    assert "pause.rate: 0.1 in the checkpoint, 0.2 in this run" in message
    assert "optim.lr: 0.002 in the checkpoint, 0.5 in this run" in message
    assert "log.every" not in message
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_a_checkpoint_of_another_corpus(corpus, other_tokenizer, shards, tmp_path):
    keys = [f"run.dir={tmp_path}/run"]
    assert run_on_ranks(1, pretrain, f"data.prefix={corpus}", *keys)[0][0] == 0
    one = str(next(iter(sorted(shards.glob("c4-validation.*")))))
    arguments = ["--input", one, "--tokenizer", str(shards / "tokenizer.model"), "--output", str(tmp_path / "other")]
    assert main(["prepare", *arguments]) == 0
    assert "corpus: " in refused(1, f"data.prefix={tmp_path}/other", *keys)


def test_a_full_disk_while_saving(corpus, tmp_path):
    """The first checkpoint is written; the kernel then refuses files beyond 64 KB."""
    keys = [f"data.prefix={corpus}", f"run.dir={tmp_path}/run"]
    assert run_on_ranks(1, pretrain, *keys, "train.steps=4")[0][0] == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    ((code, message),) = run_on_ranks(1, pretrain, *keys, "train.steps=4", file_limit=65536)
    assert code == 2
    assert "the checkpoint of step 4 could not be written; earlier ones are untouched" in message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not list(checkpoints.glob(".incoming-*"))
    assert run_on_ranks(1, pretrain, *keys, "train.steps=4")[0][0] == 0
    assert (checkpoints / "latest" / "manifest.json").is_file()


def test_an_unknown_key_with_the_nearest_name(tmp_path):
    assert "Did you mean 'pause.placement'" in refused(1, "pause.placment=uniform", f"run.dir={tmp_path}/run")
