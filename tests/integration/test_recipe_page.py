"""The retrofit of recipes/README.md, with its own commands, on a small chat model: every verb from import to answer."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chat_forms import FORMS, write_chat_model
from support.prose import documents, write_shards
from support.ranks import run_on_ranks

from pause_megatron.checkpoint import MergedReader
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.cli import main

PAGE = Path(__file__).resolve().parents[2] / "pause_megatron" / "recipes" / "README.md"
SMALL = [
    *("train.steps=2", "optim.warmup_steps=0", "batch.global_size=4", "engine.precision=fp32", "log.tensorboard=false"),
    *("validation.every=2", "validation.samples=4", "checkpoint.every=0"),
]
# Added to the page's commands, so that they are small and read the test's own records.
ADDED = {
    "pretrain": [*SMALL, "data.sequence_length=512", "data.split=80,20,0", "optim.lr=1e-2"],
    "finetune": [*SMALL, "finetune.epochs=null", "task.path=records/gsm8k", "task.limit=6", "batch.micro_size=1"],
    "prepare": ["--workers", "1"],
    "evaluate": ["--task-path", "records", "--limit", "2", "--device", "cpu"],
    "generate": ["--device", "cpu", "--json"],
}


def blocks(language: str) -> list[str]:
    """The blocks of a language in the page, continued lines joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block) for block in found]


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Work in a folder (contextlib.chdir needs Python 3.11)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def verb(arguments: list[str], folder: str) -> tuple[int, str, str]:
    """A command in a folder: its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return main(arguments), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, task_records) -> Path:
    """A working folder as the page assumes: a chat model, shards, and a task's records."""
    folder = tmp_path_factory.mktemp("retrofit")
    write_chat_model(folder / "Llama-3.2-1B-Instruct", FORMS["llama3"], positions=1024)
    write_shards(folder / "shards", documents(60), 2)
    shutil.copytree(task_records / "gsm8k", folder / "records" / "gsm8k")
    return folder


def test_the_pages_commands_retrofit_a_model(workplace):
    said = {}
    main_way, lora = blocks("")
    for line in [*main_way.splitlines(), *lora.splitlines()]:
        program, name, *arguments = shlex.split(line)
        assert program == "pause-megatron", line
        [(code, out, err)] = run_on_ranks(1, verb, [name, *arguments, *ADDED.get(name, [])], str(workplace))
        assert code == 0, (line, err[-2000:])
        said[name] = out

    imported, rows, whole = (
        MergedReader(open_newest(workplace / place).folder) for place in ("ckpt", "runs/retrofit-rows", "runs/retrofit")
    )
    embedding = "embedding.word_embeddings.weight"
    before, after = (reader.rows(embedding, 0, 407) for reader in (imported, rows))
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [406]  # the pause
    assert (whole.rows(embedding, 0, 407) != after).any(dim=1).sum() > 100

    out = workplace / "out"
    assert json.loads((out / "config.json").read_text())["pause"]["m_ft"] == 10
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [401, 404, 405]  # all ends of the source
    assert {path.name for path in (out / "additional_chat_templates").iterdir()} == {"pause.jinja"}
    assert (out / "chat_template.jinja").read_text() == FORMS["llama3"].template
    results = json.loads((workplace / "results" / "results.json").read_text())
    assert {entry["pauses"] for entry in results["results"]} == {0, 2, 5, 10, 25}
    assert json.loads((workplace / "merged-native" / "config.json").read_text())["pause"]["m_ft"] == 10
    assert (workplace / "adapter" / "adapter_model.safetensors").is_file()
    assert "model.config.pause |= {'m_ft': 10}\n" in (workplace / "adapter" / "README.md").read_text()
    completion = json.loads(said["generate"])["completions"][0]
    assert completion["pauses"] == 10 and "<pause>" not in completion["text"]


def test_the_pages_adapter_is_trained_merged_and_read_again(workplace):
    [code] = blocks("python")
    code = code.replace("num_train_epochs=1", 'num_train_epochs=1, use_cpu=True, report_to="none"')
    with inside(str(workplace)):
        names: dict[str, object] = {}
        exec(compile(code, str(PAGE), "exec"), names)
    given = ["--model", "merged", "--prompt", "Question: what is 2 + 3? Answer:", "--max-new-tokens", "4"]
    code, out, err = verb(["generate", *given, "--device", "cpu", "--json"], str(workplace))
    assert code == 0, err
    assert json.loads(out)["completions"][0]["pauses"] == 10
    code, out, err = verb(["import-hf", "merged", "again"], str(workplace))
    assert code == 0 and "(kept)" in out, err
