"""Real processes that get a stop signal, or hang in their data or in an endless kernel."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import DEVICE, environment, keys

HANG_SECONDS = 12  # more than the first step takes, which compiles kernels
STEPS_BEFORE = 2


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment(), stdout=output, stderr=subprocess.STDOUT
        )


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen, log: Path, seconds: float = 80) -> None:
    end = time.monotonic() + seconds
    while count(folder) < steps:
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)


def count(folder: Path) -> int:
    place = folder / "metrics.jsonl"
    return len(place.read_text().splitlines()) if place.exists() else 0


def test_sigterm_saves_and_logs_it(corpus, tmp_path, figures):
    from pause_megatron.checkpoint import Store

    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(
        ["-m", "pause_megatron", "pretrain", "--recipe", "tiny-pause", *keys(corpus, folder, "train.steps=100000")], log
    )
    try:
        wait_for_steps(folder, STEPS_BEFORE, process, log)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        taken = time.monotonic() - begun
    finally:
        process.kill()
    text = log.read_text()
    assert code == 75, text[-3000:]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert Store(folder / "checkpoints").newest_complete()[1].progress["step"] == last
    assert f"stopped after step {last}" in text
    figures(seconds_to_stop=taken, step=last)
    figures.line(f"signals: SIGTERM: saved step {last}, exit 75 after {taken:.1f} s")


@pytest.mark.parametrize("where", ["data", "kernel"])
def test_a_hang_is_ended_and_shows_where(corpus, tmp_path, figures, where, request):
    if where == "kernel":
        request.getfixturevalue("cuda")
    folder, log = tmp_path / "run", tmp_path / "log"
    more = [f"run.hang_seconds={HANG_SECONDS}", "validation.every=0"]
    process = start([__file__, where, *keys(corpus, folder, *more)], log)
    try:
        wait_for_steps(folder, STEPS_BEFORE, process, log)
        begun = time.monotonic()
        code = process.wait(4 * HANG_SECONDS)
        taken = time.monotonic() - begun
    finally:
        process.kill()
    text = log.read_text()
    assert code == 76, text[-3000:]
    assert f"nothing for {HANG_SECONDS} s (run.hang_seconds)" in text
    assert ("in never" if where == "data" else " in train") in text
    figures(seconds_to_end=taken)
    figures.line(f"signals: hang in {where}: exit 76 after {taken:.1f} s (run.hang_seconds={HANG_SECONDS})")


def hang(where: str, arguments: list[str]) -> int:
    """A run that takes a few steps and then hangs."""
    from pause_megatron.cli import main
    from pause_megatron.data.windows.dataset import PauseGPTDataset
    from pause_megatron.engine import Engine

    seen = [0]
    if where == "data":
        read = PauseGPTDataset.__getitem__

        def never(self, number):
            seen[0] += 1
            while seen[0] > 8 * (STEPS_BEFORE + 1):  # windows
                time.sleep(1)
            return read(self, number)

        PauseGPTDataset.__getitem__ = never
    else:
        import torch

        step = Engine.train_step

        def stuck(self, *given, **named):
            seen[0] += 1
            if seen[0] > STEPS_BEFORE:
                torch.cuda._sleep(2 * 10**9 * 60)  # cycles of about half a nanosecond: a minute
            return step(self, *given, **named)

        Engine.train_step = stuck
    return main(["pretrain", "--recipe", "tiny-pause", *arguments])


if __name__ == "__main__":
    assert DEVICE == "cuda" or sys.argv[1] == "data"
    sys.exit(hang(sys.argv[1], sys.argv[2:]))
