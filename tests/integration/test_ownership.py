"""One job at a time in a run folder; and what a dead one leaves behind is no obstacle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from forked_ranks import finish, metrics, run_config, start
from ranks import RankError, run_on_ranks

BEAT = 0.2
ELSEWHERE = {"host": "another-machine", "process": 7, "job": "42", "since": "2026-01-01 00:00:00"}


def wait_for_steps(folder: Path, output: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < steps:
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)


def test_a_second_job_is_refused_and_named_and_a_killed_one_is_followed_at_once(corpus, tmp_path):
    output = tmp_path / "log"
    processes = start(run_config(corpus, tmp_path, 1), output)
    wait_for_steps(tmp_path, output, 1)
    for process in processes:  # stopped, so that it is there as long as it is wanted
        os.kill(process.pid, signal.SIGSTOP)
    second = tmp_path / "second.log"
    finish(start(run_config(corpus, tmp_path, 1), second), second, code=1)
    expected = f"run.dir={tmp_path}: expected a folder that no other job runs in, held by process {processes[0].pid} on"
    assert second.read_text().count(expected) == 2, second.read_text()  # on both ranks
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    third = tmp_path / "third.log"
    finish(start(run_config(corpus, tmp_path, 1), third), third)
    assert not (tmp_path / ".owner.json").exists() and not (tmp_path / ".lock").exists()


def take(folder: str) -> str:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize
    from pause_megatron.train.ownership import own_run

    with initialize(ParallelSection()) as context, own_run(Path(folder), context, BEAT):
        time.sleep(2 * BEAT)
        return (Path(folder) / ".owner.json").read_text()


def beat_elsewhere(owner: str, done: threading.Event) -> None:
    """What a job on another machine does to the file; its lock is not seen here."""
    count = 0
    while not done.is_set():
        count += 1
        partial = Path(owner).with_suffix(".new")
        partial.write_text(json.dumps({**ELSEWHERE, "beat": count}))
        partial.replace(owner)
        time.sleep(BEAT)


def test_a_job_on_another_machine_is_known_by_its_signs_of_life(tmp_path):
    """The file system's lock sees this machine only (Lustre with localflock): the owner's file decides."""
    owner = tmp_path / ".owner.json"
    owner.write_text(json.dumps(ELSEWHERE))
    done = threading.Event()
    living = threading.Thread(target=beat_elsewhere, args=(str(owner), done), daemon=True)
    living.start()
    with pytest.raises(RankError, match="held by process 7 on another-machine, SLURM job 42, since 2026-01-01"):
        run_on_ranks(1, take, str(tmp_path))
    done.set()
    living.join()


def test_what_a_dead_job_of_another_machine_left_behind_is_taken_over(tmp_path):
    owner = tmp_path / ".owner.json"
    for age in (0.0, 3600.0):  # it died just now, and then it waits for a sign of life; or long ago
        owner.write_text(json.dumps(ELSEWHERE))
        os.utime(owner, (time.time() - age, time.time() - age))
        record = json.loads(run_on_ranks(1, take, str(tmp_path))[0])
        assert record["host"] != ELSEWHERE["host"] and record["beat"] >= 1
        assert not owner.exists()
    owner.write_text("half a rec")
    run_on_ranks(1, take, str(tmp_path))
