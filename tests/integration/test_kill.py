"""kill -9 at random moments, inside saves too: restarted, the run ends as the one that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked_ranks import STEPS, assert_same, finish, metrics, run_config, start


def kill_at(processes: list, checkpoints: Path, rng: random.Random, one_rank: bool) -> bool:
    """Kills all ranks (or one, and then the others, as a launcher does). False if the run ended before."""
    inside_a_save = rng.random() < 0.5
    time.sleep(rng.uniform(0.3, 2.5))
    if inside_a_save:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not any(checkpoints.glob(".incoming-*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
    if not any(process.is_alive() for process in processes):
        return False
    victims = rng.sample(processes, len(processes))
    for process in victims:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        if one_rank:
            time.sleep(rng.uniform(0, 0.2))
    for process in processes:
        process.join()
    return True


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_kill_and_restart_ends_as_the_uninterrupted_run(corpus, tmp_path, zero, full):
    straight = tmp_path / "straight"
    finish(start(run_config(corpus, straight, zero), tmp_path / "straight.log"), tmp_path / "straight.log")
    assert [line["step"] for line in metrics(straight)] == list(range(1, STEPS + 1))

    rng = random.Random(zero)
    kills, inside_saves, runs, wanted = 0, 0, 0, 200 if full else 17
    while kills < wanted:
        folder, output = tmp_path / f"killed-{runs}", tmp_path / f"killed-{runs}.log"
        processes = start(run_config(corpus, folder, zero), output)
        if kill_at(processes, folder / "checkpoints", rng, one_rank=rng.random() < 0.3):
            kills += 1
            inside_saves += any((folder / "checkpoints").glob(".incoming-*"))
        else:  # it ended before it was hit: the next kills hit another run
            finish(processes, output)
            assert_same(folder, straight)
            runs += 1
    folder, output = tmp_path / f"killed-{runs}", tmp_path / f"killed-{runs}.log"
    finish(start(run_config(corpus, folder, zero), output), output)
    assert_same(folder, straight)
    assert inside_saves >= wanted // 5, "too few of the kills hit a save"
