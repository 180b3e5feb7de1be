"""SIGTERM, SIGINT or SIGUSR2 to one rank: all finish the step, save, and say so with their exit code."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from support.file_calls import Delay, FileCall, available
from support.forked_ranks import STEPS, assert_same, finish, metrics, run_config, start
from support.log_lines import log_lines

from pause_megatron.checkpoint import Store
from pause_megatron.data.windows.text_window import TextWindow
from pause_megatron.train.run import EXIT_STOPPED


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    finish(start(run_config(corpus, folder, 1), folder / "log"), folder / "log")
    return folder


@pytest.mark.skipif(not available(), reason="this kernel does not hand over file calls")
@pytest.mark.parametrize(
    ("number", "in_a_save"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR2, False), (signal.SIGTERM, True)],
)
def test_a_signal_to_one_rank_stops_all_and_loses_no_step(corpus, straight, tmp_path, number, in_a_save):
    output, rng = tmp_path / "log", random.Random(number + in_a_save)

    def counts(rank: int, call: FileCall) -> bool:
        place = tmp_path / ("checkpoints" if in_a_save else "metrics.jsonl")
        return call.writes and call.path.is_relative_to(place)

    # At a write of the second or third save, or between two steps.
    delay = Delay(counts, rng.randrange(70, 180) if in_a_save else rng.randrange(4, STEPS - 2))
    processes = start(run_config(corpus, tmp_path, 1), output, delay)
    assert delay.reached.wait(60), output.read_text()
    for _ in range(1 + in_a_save):  # the second one must not end the save
        os.kill(processes[1].pid, number)
    delay.release()
    finish(processes, output, code=EXIT_STOPPED)
    done = metrics(tmp_path)[-1]["step"]
    assert 3 <= done < STEPS
    assert Store(tmp_path / "checkpoints").steps()[-1] == done
    (end,) = [line for line in log_lines(output.read_text()) if line.startswith(f"stopped after step {done}")]
    assert end.endswith(f"; saved in {Store(tmp_path / 'checkpoints').path(done)}: the same command resumes")

    finish(start(run_config(corpus, tmp_path, 1), output), output)
    assert f"resuming after step {done}" in output.read_text()
    assert_same(tmp_path, straight)


def test_a_complete_run_reports_that(corpus, straight):
    output = straight / "log"
    finish(start(run_config(corpus, straight, 1), output), output)
    end = log_lines(output.read_text())[-1]
    assert end.startswith(f"complete after step {STEPS}") and end.endswith(f"/checkpoints/step-{STEPS:08d}")


class StopsInValidation:
    """A policy that asks its own rank to stop while window 20 of a validation is read."""

    def place(self, window: TextWindow, rng: np.random.Generator) -> np.ndarray:
        if (window.split, window.sample) == ("valid", 20):
            os.kill(os.getpid(), signal.SIGTERM)
        return rng.integers(1, window.text.size + 1, window.count)


def test_a_signal_during_a_validation_ends_it_and_saves_its_step(corpus, tmp_path):
    config = run_config(corpus, tmp_path, 1)
    changes = {"pause": {"placement": f"{__name__}:StopsInValidation"}, "validation": {"samples": 300, "every": 3}}
    parts = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    output = tmp_path / "log"
    processes = start(config.model_copy(update=parts), output)
    finish(processes, output, code=EXIT_STOPPED)
    assert Store(tmp_path / "checkpoints").steps()[-1] == 3 == metrics(tmp_path)[-1]["step"]
    assert "valid_loss" not in metrics(tmp_path)[-1]
    said = output.read_text()
    assert "validation ends after 32 of 300 windows, without its losses: a stop is requested" in said
    assert "stopped after step 3" in said
