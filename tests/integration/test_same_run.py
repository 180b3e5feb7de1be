"""Two ranks of different runs, through the real program: one message, exit code 2 on both, and no rank waits."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.forked_ranks import fork, run_config

import pause_megatron
from pause_megatron.cli import main
from pause_megatron.config.load import dump


def program(
    arguments: list[list[str]], environments: list[dict[str, str]], folders: list[str], sources: str | None
) -> None:
    """A rank: the command line with its own words; `sources`: that rank 1 has in place of the package's."""
    from pause_megatron.train.guards import same_run

    rank = int(os.environ["RANK"])
    os.environ.update(environments[rank])
    os.chdir(folders[rank])
    if sources and rank == 1:
        same_run.code_digest.__defaults__ = (Path(sources),)
    raise SystemExit(main(arguments[rank]))


def ended(
    tmp_path: Path,
    *arguments: list[str],
    environments: Sequence[dict[str, str]] = ({}, {}),
    folders: Sequence[Path] = (Path("."), Path(".")),
    sources: Path | None = None,
) -> tuple[list[int], str]:
    """Exit codes of ranks with these words, and what they say."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    given = (list(arguments), list(environments), list(map(str, folders)), sources and str(sources))
    processes = fork(program, given, log, ranks=len(arguments))
    for process in processes:
        process.join(60)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"a rank waits:\n{log.read_text()}"
    return [process.exitcode for process in processes], log.read_text()


@pytest.fixture
def words(corpus, tmp_path) -> list[str]:
    """Of a short run."""
    file = tmp_path / "given.yaml"
    file.write_text(dump(run_config(corpus, tmp_path / "run", 1)), encoding="utf-8")
    return ["pretrain", "--config", str(file), "run.connect_seconds=50"]


@pytest.fixture(scope="module")
def other_corpus(shards: Path, corpus: str, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("other")
    lines = [json.dumps({"text": f"Another text, number {number}, " * 50}) for number in range(50)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prefix, tokenizer = str(folder / "english"), str(shards / "tokenizer.model")
    assert main(["prepare", "--input", str(folder / "text.jsonl"), "--tokenizer", tokenizer, "--output", prefix]) == 0
    return prefix


def messages(text: str) -> list[str]:
    return re.findall(r"^pause-megatron: .*", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=0.01", "optim.lr is 0.002 on rank 0 and 0.01 on rank 1"),
        ("batch.micro_size=1", "batch.micro_size is 2 on rank 0 and 1 on rank 1"),
        ("engine.zero_stage=3", "engine.zero_stage is 1 on rank 0 and 3 on rank 1"),
        ("pause.rate=0.2", "pause.rate is 0.1 on rank 0 and 0.2 on rank 1"),
        ("run.seed=7", "run.seed is 1234 on rank 0 and 7 on rank 1"),
        ("parallel.tensor=2", "parallel.tensor is 1 on rank 0 and 2 on rank 1"),
    ],
)
def test_another_value_on_rank_1_is_refused_before_the_first_step(override, line, words, tmp_path):
    codes, text = ended(tmp_path, words, [*words, override])
    assert codes == [2, 2], text
    assert len(messages(text)) == 1 and "error: expected the same run on every rank:" in text
    assert line in text
    assert not (tmp_path / "run").exists()


def test_other_files_under_the_same_names_are_refused(words, corpus, other_corpus, tmp_path):
    """On each host a copy: of the corpus, of the DeepSpeed file, of the sources."""
    sources = tmp_path / "sources"
    shutil.copytree(Path(pause_megatron.__file__).parent / "config", sources / "config")
    for folder, prefix, size in (("a", corpus, 1000), ("b", other_corpus, 2000)):
        (tmp_path / folder).mkdir()
        for file in Path(prefix).parent.glob("english.*"):
            (tmp_path / folder / file.name).symlink_to(file)
        settings = {"zero_optimization": {"stage": 1, "reduce_bucket_size": size}}
        (tmp_path / folder / "own.json").write_text(json.dumps(settings))
    mine = [*words, "data.prefix=english", "engine.ds_config=own.json", "engine.zero_stage=null"]
    codes, text = ended(tmp_path, mine, mine, folders=(tmp_path / "a", tmp_path / "b"), sources=sources)
    assert codes == [2, 2], text
    assert len(messages(text)) == 1
    assert "zero_optimization.reduce_bucket_size for DeepSpeed is 1000 on rank 0 and 2000 on rank 1" in text, text
    assert re.search(r"version of pause-megatron is .* on rank 0 and .* on rank 1", text), text
    assert re.search(r"content of data.prefix is xxh3_128:\S+ on rank 0 and xxh3_128:\S+ on rank 1", text), text


def test_other_task_records_and_mixed_verbs_are_refused(words, shards, corpus, task_records, tmp_path):
    mine, other = task_records / "commonsense_qa", tmp_path / "records"
    shutil.copytree(mine, other)
    (file,) = other.glob("train.jsonl*")
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))
    task = ["task.name=commonsense_qa", "task.limit=8", f"data.tokenizer={shards / 'tokenizer.model'}"]
    task += ["data.sequence_length=256", "train.steps=2", "finetune.pauses=2", f"run.dir={tmp_path / 'run'}"]
    finetuning = ["finetune", *task, "run.connect_seconds=50"]
    codes, text = ended(tmp_path, [*finetuning, f"task.path={mine}"], [*finetuning, f"task.path={other}"])
    assert codes == [2, 2] and len(messages(text)) == 1, text
    assert re.search("content of task.path is xxh3_128:.* on rank 0 and xxh3_128:.* on rank 1", text), text
    codes, text = ended(tmp_path, words, [*finetuning, f"task.path={mine}"])
    assert codes == [2, 2] and len(messages(text)) == 1, text
    assert "verb is pretrain on rank 0 and finetune on rank 1" in text


def test_a_corpus_that_one_rank_lacks_is_an_error_on_all(words, tmp_path):
    codes, text = ended(tmp_path, words, [*words, "data.prefix=/nowhere/corpus"])
    assert codes == [2, 2], text
    (message,) = messages(text)
    assert (
        message.startswith(f"pause-megatron: error: rank 1 on {socket.gethostname()}: ")
        and "/nowhere/corpus" in message
    )


def test_a_file_that_one_rank_cannot_read_and_a_fault_of_all(words, tmp_path):
    codes, text = ended(tmp_path, words, ["pretrain", "--config", str(tmp_path / "none.yaml")])
    assert codes == [2, 2], text
    (message,) = messages(text)
    assert f"rank 1 on {socket.gethostname()}: --config: {tmp_path}/none.yaml cannot be read" in message
    wrong = [*words, "optim.rl=1"]
    codes, text = ended(tmp_path, wrong, wrong)
    assert codes == [2, 2] and len(messages(text)) == 1, text
    assert "pause-megatron: error: command line: unknown key 'optim.rl'" in text


def test_another_verb_and_a_dry_run_on_one_rank_are_refused(words, tmp_path):
    codes, text = ended(tmp_path, words, [*words, "--dry-run"])
    assert codes == [2, 2] and "verb is pretrain on rank 0 and --dry-run on rank 1" in text, text
    assert len(messages(text)) == 1
    codes, text = ended(tmp_path, [*words, "--dry-run"], [*words, "--dry-run"])
    assert codes == [0, 0] and text.count("2 = 2 data parallel x 1 tensor parallel") == 1 and not messages(text), text


@pytest.mark.parametrize(
    ("environments", "line"),
    [
        (
            ({}, {"RANK": "0"}),
            r"RANK=0: expected one process with each rank, got two: process \d+ on \S+, and process \d+",
        ),
        (({}, {"WORLD_SIZE": "3"}), r"WORLD_SIZE: expected the same number on every rank, got .*2 on rank 0 \(process"),
        (
            ({"NVTE_FUSED_ATTN": "1"}, {"NVTE_FUSED_ATTN": "0"}),
            "variable NVTE_FUSED_ATTN is 1 on rank 0 and 0 on rank 1",
        ),
    ],
)
def test_ranks_with_wrong_variables_fail_at_once(environments, line, words, tmp_path):
    codes, text = ended(tmp_path, words, words, environments=environments)
    assert codes == [2, 2], text
    assert re.search(line, text), text
    assert "run.connect_seconds" not in text
