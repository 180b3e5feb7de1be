"""The small grid of tests/benchmarks: budgets of its controls, and records that show no year."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.small.periods import PERIODS, WORDS, passages, records_of

from pause_megatron.experiment.grid import expand
from pause_megatron.experiment.inputs import assumed_inputs
from pause_megatron.experiment.load import load_grid
from pause_megatron.experiment.models import resolve_models

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/small"
VOCABULARY = 4096


def test_the_controls_have_equal_parameters_and_the_flops_of_the_pauses(monkeypatch):
    monkeypatch.chdir(FOLDER.parents[2])
    grid = load_grid(FOLDER / "grid.yaml")
    models = resolve_models(grid, VOCABULARY)
    flops = {name: model.tokens * model.flops_per_token for name, model in models.items()}
    assert {model.parameters for model in models.values()} == {models["StdPT"].parameters}
    for name in ("LongerPT", "LoopedPT"):
        assert abs(flops[name] / flops["PausePT"] - 1) < 0.01
    text = {name: model.tokens * model.text_share for name, model in models.items()}
    assert abs(text["PausePT"] / text["StdPT"] - 1) < 0.01
    plan = expand(grid, assumed_inputs(grid))
    assert {cell.verb for cell in plan.cells} == {"pretrain", "finetune", "export-hf", "evaluate"}


def test_passages_have_one_length_and_show_no_digit():
    text = "one two three. " * 40 + "It was so in 1823. " + "four five six. " * 40
    found = list(passages(text))
    assert found and all(len(passage.split()) == WORDS for passage in found)
    assert not any(map(str.isdigit, "".join(found)))


def test_each_period_has_as_many_records_and_each_record_its_speech():
    text = "So it was, and so it is, and so it shall be for ever. " * 40
    speeches = [{"id": f"s{year}", "year": year, "text": text} for year in range(1790, 2020, 7)]
    records = records_of(speeches, 40, random.Random(0))
    assert [sum(record["gold"] == gold for record in records) for gold in range(4)] == [10] * 4
    for record in records:
        assert int(record["speech"][1:]) in PERIODS[record["periods"][record["gold"]]]
