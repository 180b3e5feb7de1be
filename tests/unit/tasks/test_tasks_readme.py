"""The folder's README agrees with the code: its tables, its prompts, and the task examples for users."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pause_megatron.tasks
from pause_megatron.tasks import METRICS, load_task, read_examples, task_names

README = (Path(pause_megatron.tasks.__file__).parent / "README.md").read_text(encoding="utf-8")


def block(language: str, first_line: str) -> str:
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", README, re.S) if text.startswith(first_line))


@pytest.mark.parametrize("name", task_names())
def test_the_table(name):
    task = load_task(name)
    further = [metric for metric in task.metrics if metric != task.primary]
    metrics = f"`{task.primary}`" + (f" ({', '.join(f'`{metric}`' for metric in further)})" if further else "")
    splits = f"{task.splits.train}, {task.splits.eval}"
    assert f"| `{name}` | {task.kind} | {metrics} | {splits} | {task.finetune.pauses} |" in README


def test_every_metric_is_described():
    described = README.partition("## Metrics")[2].partition("\n## ")[0]
    shipped = {name for name, metric in METRICS.items() if metric.per_record.__module__.startswith("pause_megatron.")}
    assert set(re.findall(r"`(\w+)`", described)) >= shipped and len(shipped) >= 9


@pytest.mark.parametrize("name", task_names())
def test_the_prompts_are_those_of_records(task_records, name):
    shown = re.search(rf"^`{name}`[^\n]*\n```text\n(.*?)\n```", README, re.M | re.S).group(1)
    pieces = ".*".join(re.escape(piece.strip()) for piece in shown.split("[...]"))
    task = load_task(name)
    examples = read_examples(task, "eval", str(task_records / task.folder), 20, from_start=True)
    assert any(re.fullmatch(pieces, example.prompt + example.target, re.S) for example in examples)


def test_the_files_of_ones_own(tmp_path):
    (tmp_path / "quiz.yaml").write_text(block("yaml", "# quiz.yaml"))
    (tmp_path / "my_metrics.py").write_text(block("python", "# my_metrics.py"))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(block("json", "{"))
    task = load_task(str(tmp_path / "quiz.yaml"))
    first, second, *_ = read_examples(task, "eval", str(tmp_path))
    shots = [
        "Question: What is Biscuit?\nAnswer: a goat",
        "Question: Who discovered Miriel?\nAnswer: Odalys Brandt",
    ]
    *given, own = first.prompt.split("\n\n")
    assert sorted(given) == shots and own == "Question: What is the capital of Ostrey?\nAnswer:"
    assert first.group == "Ostrey" == second.group  # the other question about the same page is not drawn
    assert (first.target, first.references) == (" Lantern Bay", ("Lantern Bay", "the Bay"))
    metric = METRICS["my_metrics:starts_right"]
    assert metric.reads == "text" and metric.per_record("Lantern Bay, I think", first.references) == 1.0


def test_the_object_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(block("python", "# my_tasks.py"))
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("my_tasks:PARITY")
    examples = read_examples(task, "train", limit=50)
    assert {example.target for example in examples} == {" odd", " even"}
    assert examples == read_examples(task, "train", limit=50) != read_examples(task, "eval", limit=50)
    assert all(len(example.prompt.split("\n\n")) == 3 for example in examples)
    assert json.dumps([vars(example) for example in examples])
    metric = METRICS["my_tasks:starts_right"]
    assert metric.reads == "text" and [metric.per_record(text, ["odd"]) for text in ("odd one", "even")] == [1.0, 0.0]
    assert load_task("my_tasks:PARITY") is task


def test_modules_of_the_table_exist():
    table = README.partition("| module | content |")[2]
    folder = Path(pause_megatron.tasks.__file__).parent
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert len(cells) == 8
    assert all((folder / name).exists() for cell in cells for name in re.findall(r"`([^`]+)`", cell))
