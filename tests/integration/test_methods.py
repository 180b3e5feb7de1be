"""The commands of recipes/METHODS.md on real text: each method's tiny recipe, its export, its way of generating."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.cards import run_card
from support.ranks import run_on_ranks

from pause_megatron.cli import main
from pause_megatron.config.load import load_saved
from pause_megatron.data.supervised.answer_values import AnswerValues
from pause_megatron.evaluate.results import read_results
from pause_megatron.experiment.execute import Stop, run_cell
from pause_megatron.experiment.folder import write_plan
from pause_megatron.experiment.grid import expand
from pause_megatron.experiment.inputs import read_inputs
from pause_megatron.experiment.load import load_grid
from pause_megatron.experiment.stored import DoneFile

PAGE = Path(__file__).resolve().parents[2] / "pause_megatron" / "recipes" / "METHODS.md"
SMALL = [
    *(
        "train.steps=20",
        "optim.warmup_steps=2",
        "data.sequence_length=128",
        "batch.global_size=8",
        "batch.micro_size=8",
    ),
    *("model.hidden=64", "model.heads=2", "checkpoint.every=0", "validation.every=0", "log.tensorboard=false"),
]
ADDED = {
    "pretrain": SMALL,
    "finetune": [
        *("train.steps=2", "optim.warmup_steps=0", "finetune.epochs=null", "finetune.pauses=2", "batch.global_size=4"),
        *("batch.micro_size=4", "task.path=records/gsm8k", "task.limit=6", "data.sequence_length=512"),
        *("checkpoint.every=0", "validation.every=0", "log.tensorboard=false", "engine.precision=fp32"),
    ],
    "score": ["--processes", "1", "--device", "cpu"],
    "score --task": ["--task-path", "records", "--device", "cpu"],
    "generate": ["--device", "cpu", "--json"],
}


def commands() -> list[list[str]]:
    """The commands of the page, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [shlex.split(line) for line in lines]


def run_commands(folder: str, wanted: list[list[str]]) -> dict[str, str]:
    """Run commands in a folder, in this process. Returns what `generate` printed by its model."""
    os.chdir(folder)
    answers = {}
    for program, verb, *arguments in wanted:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            added = "score --task" if "--task" in arguments else verb
            code = main([verb, *arguments, *ADDED.get(added, [])])
        assert (program, code) == ("pause-megatron", 0), (verb, arguments, err.getvalue()[-2000:])
        if verb == "generate":
            answers[arguments[arguments.index("--model") + 1]] = out.getvalue()
    return answers


def run_row(folder: str) -> dict[str, tuple[str, str, object]]:
    """Run the cells of the row DIT of the grid methods-tiny, smaller, each verb in this process.

    Returns verb, the cell's folder and its ledger by the cell's name, in their order.
    """
    few = ["train.steps=2", "optim.warmup_steps=0", "checkpoint.every=0"]
    small = [each for each in SMALL if each.partition("=")[0] not in ("train.steps", "optim.warmup_steps")]
    given = [f"models.StdPT.set.{each}" for each in (*small, *few)] + [f"finetune.set.{each}" for each in few]
    data = [f"data.prefix={folder}/data/text", f"data.tasks={folder}/records", "evaluate.device=cpu"]
    more = ["seeds=[1]", "evaluate.limit=2", "models.StdPT.set.data.sequence_length=512"]
    grid = load_grid(recipe="methods-tiny", overrides=[*given, *data, *more])
    only = {"models": "StdPT", "variants": "DIT", "tasks": "squad"}
    parts = {key: {name: getattr(grid, key)[name]} for key, name in only.items()}
    grid = grid.model_copy(update={**parts, "baseline": "DIT"})
    located = write_plan(Path(folder, "grid"), grid, expand(grid, read_inputs(grid)), ranks=1)

    def in_this_process(program: Sequence[str], ranks: int) -> list[str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(program[1:]))
        assert (code, ranks) == (0, 1), (program, err.getvalue()[-2000:])
        return ["true"]

    for entry in located.values():
        assert run_cell(entry.folder, in_this_process, Stop()).code == 0
    ledgers = {name: DoneFile.read(entry.folder).ledger for name, entry in located.items()}
    return {each.cell.name: (each.cell.verb, str(each.folder), ledgers[name]) for name, each in located.items()}


def run_page(folder: str) -> tuple[dict[str, str], dict[str, tuple[str, str, object]]]:
    """Run the commands of the page, then the grid's row."""
    return run_commands(folder, commands()), run_row(folder)


@pytest.fixture(scope="module")
def workplace(corpus, task_records, tmp_path_factory) -> Path:
    """A working folder as the page assumes: a corpus, and a task's records."""
    folder = tmp_path_factory.mktemp("methods")
    prefix = Path(corpus)
    (folder / "data").mkdir()
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        place = folder / "data" / path.name.replace(prefix.name, "text", 1)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, place)
    for task in ("gsm8k", "squad"):
        shutil.copytree(task_records / task, folder / "records" / task)
    return folder


def test_the_pages_commands_train_export_and_generate(workplace):
    [(answers, cells)] = run_on_ranks(1, run_page, str(workplace), timeout=500)
    entries = {
        path.parent.name: json.loads(path.read_text())["pause"] for path in sorted(workplace.glob("out-*/config.json"))
    }
    assert {f"{name}/" for name in entries if name != "out-std"} == set(answers)
    for text in answers.values():
        (completion,) = json.loads(text)["completions"]
        assert "<pause>" not in completion["text"]
    assert entries["out-every-k"]["decoding"] == {"every": 1, "count": 1, "in_prompt": True}
    assert (entries["out-every-k"]["placement"], entries["out-every-k"]["positions"]) == ("every", "shared")
    assert entries["out-cyb"]["requests"] == 2 and entries["out-dit"]["placement"] == "scored"
    assert entries["out-every-k"]["rate"] == 0.5  # pause.rate says nothing there
    cards = {name: (workplace / name / "README.md").read_text() for name in entries}
    assert "| 0.5 of the window" in cards["out-every-k"]
    assert "within them**: 1 after each token of prompts and answers. The call" in cards["out-every-k"]
    assert "| objective | `cyb_anytime`, discount 0.9 |" in cards["out-cyb"]
    assert "up to 2 before a token, one each time that the model selects `<pause>`. The call" in cards["out-cyb"]
    assert "| placement | `uniform`, runs of 2 |" in cards["out-cyb"]
    assert "must not emit" not in cards["out-cyb"] and "pauses=0, max_new_tokens" in cards["out-cyb"]
    assert "within answers" not in cards["out-looped"] + cards["out-std"]
    assert all("decoding" not in entries[name] for name in ("out-cyb", "out-dit", "out-looped"))
    for name, text in answers.items():
        (completion,) = json.loads(text)["completions"]
        if "decoding" in (entry := entries[name.rstrip("/")]) or "requests" in entry:
            assert "**Answers have pauses within them**" in (workplace / name / "README.md").read_text()
            assert run_card(workplace / name, completion["prompt"]) == completion["prompt"] + completion["text"], name
    lines = [json.loads(line) for line in (workplace / "runs/tiny-cyb/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and lines[-1]["loss"] < lines[0]["loss"]
    tuned = [json.loads(line) for line in (workplace / "runs/cyb-gsm8k/metrics.jsonl").read_text().splitlines()]
    retrofitted = load_saved(workplace / "runs/tiny-std-looped/config.yaml").model
    assert (retrofitted.from_, retrofitted.loops, retrofitted.loop_layers) == ("runs/tiny-std", 2, "1..2")
    dit = [json.loads(line) for line in (workplace / "runs/dit-gsm8k/metrics.jsonl").read_text().splitlines()]
    assert all(line["pause_fraction"] > 0 for line in dit)
    assert all(0 < line["objective/requested_steps"] < 2 for line in tuned)  # of runs after prompts and within answers
    check_row(cells)


def check_row(cells: dict[str, tuple[str, str, object]]) -> None:
    """The grid's row: values of the answers, a finetuning that reads them, an evaluation that decodes with pauses."""
    shared, tuned = ["pretrain", "export-hf", "score"], ["finetune", "export-hf", "evaluate"]
    assert [verb for verb, _, _ in cells.values()] == [*shared, *tuned]
    scored = Path(cells["score-StdPT-squad-loss"][1], "scores.safetensors")
    values = AnswerValues.read(scored)
    assert (values.metadata["kind"], values.metadata["model"]) == ("loss", "hf")
    ledger = cells["score-StdPT-squad-loss"][2]
    assert ledger.raw_tokens == int(values.metadata["tokens"]) > 0 and ledger.flops > 0
    for verb, folder, _ in cells.values():
        config = Path(folder, "run", "config.yaml")
        if verb == "finetune":
            assert load_saved(config).task.scores == str(scored)
            lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
            assert all(line["pause_fraction"] > 0 for line in lines)
        if verb == "evaluate":
            (result,) = [each for each in read_results(Path(folder, "results")) if each.primary]
            assert result.settings.decoding and result.settings.pauses == 0
