"""kill -9 in saves and between them, of all ranks or of one: the run ends as the one that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.file_calls import Ambush, Counting, FileCall, available
from support.forked_ranks import STEPS, assert_same, finish, metrics, run_config, start

KILLS, FULL_KILLS = 8, 200


def kill(processes: list, ambush: Ambush, rng: random.Random) -> None:
    """All ranks where they are held; or one, and the others a moment after it, as a launcher does."""
    one_rank = rng.random() < 0.3
    victims = rng.sample(processes, len(processes))
    os.kill(victims[0].pid, signal.SIGKILL)
    if one_rank:
        victims[0].join()
        ambush.release()
        time.sleep(rng.uniform(0, 0.2))
    for process in victims[1:]:
        process.kill()
    for process in processes:
        process.join()
    ambush.release()


@pytest.mark.skipif(not available(), reason="this kernel does not hand over file calls")
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_kill_and_restart_ends_as_the_uninterrupted_run(corpus, tmp_path, zero, full):
    straight = tmp_path / "straight"
    in_saves = Counting(lambda rank, call: call.writes and call.path.is_relative_to(straight / "checkpoints"))
    finish(start(run_config(corpus, straight, zero), tmp_path / "straight.log", in_saves), tmp_path / "straight.log")
    assert [line["step"] for line in metrics(straight)] == list(range(1, STEPS + 1))
    calls_of_a_save = in_saves.count // (STEPS // 2)
    assert calls_of_a_save > 20

    rng = random.Random(zero)
    runs, wanted = 0, FULL_KILLS if full else KILLS
    for number in range(wanted):
        folder, output = tmp_path / f"killed-{runs}", tmp_path / f"killed-{runs}.log"
        inside_a_save = number % 2 == 0

        def counts(
            rank: int, call: FileCall, checkpoints: Path = folder / "checkpoints", inside: bool = inside_a_save
        ) -> bool:
            return call.writes and call.path.is_relative_to(checkpoints) == inside

        # Two saves, or the first things a start writes and some steps.
        ambush = Ambush(counts, rng.randrange(2 * calls_of_a_save if inside_a_save else 30))
        processes = start(run_config(corpus, folder, zero), output, ambush)
        while not ambush.reached.wait(0.05) and any(process.is_alive() for process in processes):
            pass
        if ambush.reached.is_set():
            kill(processes, ambush, rng)
        else:  # it ended before: the next kills hit another run
            finish(processes, output)
            assert_same(folder, straight)
            runs += 1
    folder, output = tmp_path / f"killed-{runs}", tmp_path / f"killed-{runs}.log"
    finish(start(run_config(corpus, folder, zero), output), output)
    assert_same(folder, straight)
