"""The demonstration's own steps, in small: every setting's windows, and one run from initial weights to answers."""

from __future__ import annotations

import pytest
from benchmarks.pauses_matter import SETTINGS, report, run_config, train_and_score

from pause_megatron.tasks.synthetic.base import write_tokenizer
from pause_megatron.train.inputs.task_data import open_task


@pytest.mark.parametrize("name", SETTINGS)
def test_windows_hold_an_example_and_no_padding(name, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    config = run_config(SETTINGS[name], 0, 60, tmp_path)
    few = config.model_copy(update={"task": config.task.model_copy(update={"limit": 8})})
    sample = open_task(few).windows[0]
    assert (sample["segments"] == 0).all()
    assert sample["loss_mask"].tolist() == [0.0] * (SETTINGS[name].window - 2) + [1.0, 1.0]


def test_a_run_trains_exports_and_answers():
    result = train_and_score(SETTINGS["pauses-4"], seed=0, steps=20, examples=64)
    assert 0 < result["accuracy"] < 1 and 0 < result["loss"] < 3
    text = report([{"setting": "pauses-4", "seed": seed, "steps": 20, **result} for seed in range(2)], "command")
    assert f"| {100 * result['accuracy']:.1f} |" in text
