"""The declared experiment's own steps, in small: every setting's windows, and runs from initial weights to answers."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.pauses_matter import runs
from benchmarks.pauses_matter.declaration import read
from benchmarks.pauses_matter.runs import FINAL, Job, perform, run_config
from benchmarks.pauses_matter.settings import plan_of, plans

from pause_megatron.tasks.synthetic.base import write_tokenizer
from pause_megatron.train.inputs.task_data import open_task


def test_windows_hold_an_example_and_no_padding(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    declaration = read("codewords").content
    for plan in plans(declaration).values():
        config = run_config(declaration, plan, 0, 0.01, tmp_path)
        few = config.model_copy(update={"task": config.task.model_copy(update={"limit": 8})})
        sample = open_task(few).windows[0]
        assert (sample["segments"] == 0).all()
        assert sample["loss_mask"].tolist() == [0.0] * (plan.window - 2) + [1.0, 1.0]


def test_a_run_trains_exports_and_answers(monkeypatch):
    monkeypatch.setattr(runs, "plan_of", lambda *names: replace(plan_of(*names), steps=20))
    final, asked_otherwise = perform(Job("codewords", FINAL, "longer", 1, 0.01))
    assert final["digest"] == read("codewords").digest
    assert (final["setting"], asked_otherwise["setting"]) == ("longer", "filler-at-inference")
    assert 0 < final["accuracy"] < 1 and 0 < final["loss"] < 3
    assert 0 < asked_otherwise["accuracy"] < 1 and final["prompts"] == 356
    assert final["cpu"] > 0 == asked_otherwise["cpu"]
