"""A rank that hangs is found within run.hang_seconds: every rank that can print prints its stacks, and all end."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from support.forked_ranks import fork, metrics, rank_main, run_config, start

from pause_megatron.config.schema import RunConfig
from pause_megatron.train.guards.watch import EXIT_HUNG

SECONDS = 6


def watched(corpus: str, folder: Path) -> RunConfig:
    config = run_config(corpus, folder, 1)
    return config.model_copy(update={"run": config.run.model_copy(update={"hang_seconds": SECONDS})})


def test_a_stopped_rank_is_named_and_the_others_end(corpus, tmp_path):
    output = tmp_path / "log"
    processes = start(watched(corpus, tmp_path), output)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 2:
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(8 * SECONDS)
    text = output.read_text()
    assert processes[0].exitcode == EXIT_HUNG, text
    assert "[rank 0 on " in text and f"nothing for {SECONDS} s (run.hang_seconds), last: step" in text
    assert "ranks that do not answer at all: 1 (on " in text
    assert re.search(r"distributed_c10d\.py.* in all_\w+\n(.*\n)*.*training\.py.* in train\n", text), (
        text
    )  # where it waits
    os.kill(processes[1].pid, signal.SIGKILL)  # a launcher does that to what is left
    processes[1].join()
    assert processes[1].exitcode != 0


def stuck_rank(config: RunConfig) -> None:
    """On rank 1 data never come, from the third window of the run on."""
    if os.environ["RANK"] == "1":
        from pause_megatron.data.windows.dataset import PauseGPTDataset

        class Stuck:
            seen = 0

        read = PauseGPTDataset.__getitem__

        def never(self, number):
            Stuck.seen += 1
            while Stuck.seen > 12:
                time.sleep(1)
            return read(self, number)

        PauseGPTDataset.__getitem__ = never
    rank_main(config)


def test_every_rank_prints_its_stacks_when_one_waits_for_its_data(corpus, tmp_path):
    output = tmp_path / "log"
    processes = fork(stuck_rank, (watched(corpus, tmp_path),), output)
    for process in processes:
        process.join(120)
    text = output.read_text()
    # The first that ends breaks the other's connection: its watch may not get to speak.
    codes = [process.exitcode for process in processes]
    assert EXIT_HUNG in codes and all(codes), (codes, text)
    assert "in never" in text, text
