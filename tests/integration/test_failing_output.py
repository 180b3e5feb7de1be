"""Logs, TensorBoard, terminals and pipes that fail during a run: it continues, counts failures, and logs them."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.file_calls import Delay, FileCall, available
from support.forked_ranks import STEPS, final_state, finish, run_config, start
from support.log_lines import log_lines

from pause_megatron.checkpoint import Store
from pause_megatron.config.load import dump
from pause_megatron.train.run import EXIT_STOPPED
from pause_megatron.train.saving import naming_last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not available(), reason="this kernel does not hand over file calls")


class Failing:
    """A `Decide`: some lines and events cannot be written, and the folder of events is deleted in between."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, Counter()

    def __call__(self, rank: int, call: FileCall) -> int:
        of = call.path.relative_to(self._folder).parts[0] if call.path != self._folder else ""
        if call.name != "write" or of not in ("metrics.jsonl", "tensorboard"):
            return 0
        self._count[of] += 1
        if of == "metrics.jsonl" and self._count[of] == 12:
            shutil.rmtree(self._folder / "tensorboard")
            (self._folder / "config.yaml").unlink()
        lost = {"metrics.jsonl": (errno.ENOSPC, range(6, 9)), "tensorboard": (errno.EIO, range(4, 6))}[of]
        return lost[0] if self._count[of] in lost[1] else 0


def test_lines_on_a_full_disk_are_counted_and_the_others_complete(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    finish(start(run_config(corpus, folder, 1), log, Failing(folder)), log)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [step for step in range(1, STEPS + 1) if step not in (6, 7, 8)]
    said = log_lines(log.read_text())
    full = f"{folder}/metrics.jsonl: cannot be written: No space left on device; training continues, and every write "
    assert [line for line in said if line.startswith(full)] == [full + "is tried again"]
    assert f"{folder}/metrics.jsonl: 3 of {STEPS} lines could not be written (No space left on device)" in said
    assert f"{folder}/tensorboard: 2 of {STEPS} steps could not be written (Input/output error)" in said
    assert said[-1].startswith(f"complete after step {STEPS}") and "Traceback" not in log.read_text()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(12, STEPS + 1))
    assert "train:" in (folder / "config.yaml").read_text()


def test_a_run_without_any_working_output_trains_saves_and_stops(corpus, tmp_path):
    """Every line of both ranks goes to a full device; only checkpoints can be written. Then SIGHUP."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    finish(start(run_config(corpus, straight, 1), tmp_path / "log"), tmp_path / "log")
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    (folder / "tensorboard").touch()
    (folder / "config.yaml").mkdir()

    delay = Delay(lambda rank, call: call.writes and call.path.is_relative_to(folder / "checkpoints"), 100)
    nowhere = Path("/dev/full")
    processes = start(run_config(corpus, folder, 1), nowhere, delay)
    assert delay.reached.wait(60)
    os.kill(processes[1].pid, signal.SIGHUP)
    delay.release()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [EXIT_STOPPED] * 2
    assert 2 <= Store(folder / "checkpoints").steps()[-1] < STEPS

    processes = start(run_config(corpus, folder, 1), nowhere)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert final_state(folder) == final_state(straight)


def test_an_exception_after_a_save_names_the_checkpoint(tmp_path, caplog):
    store = Store(tmp_path / "checkpoints", 0, 1)
    run = SimpleNamespace(store=store, context=SimpleNamespace(rank=0), saved_step=None)
    for run.saved_step in (None, 8):
        with pytest.raises(RuntimeError, match="of the loader"), naming_last_checkpoint(run):
            raise RuntimeError("of the loader")
    assert caplog.messages == [f"step 8 was saved to {store.path(8)}: the same command resumes from there"]


def ended_on_a_terminal_that_closes(command: list[str], ready: Path, seconds: float) -> int:
    """The exit code of a command that leads a session on a terminal, whose other end closes when `ready` is there."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    os.set_blocking(terminal, False)
    end = time.monotonic() + seconds
    while not ready.exists() and time.monotonic() < end:
        try:
            os.read(terminal, 65536)
        except OSError:
            time.sleep(0.02)
    os.close(terminal)
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"{command} did not end in {seconds} s after its terminal was closed")


RANK = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(1)  # a save
    pathlib.Path(sys.argv[1], "saved-" + os.environ.get("RANK", "0")).write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, stop)
pathlib.Path(sys.argv[1], "ready-" + os.environ.get("RANK", "0")).touch()
time.sleep(600)
"""


def test_a_script_waits_for_what_it_runs_when_its_terminal_is_closed(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    script = f'source {ROOT}/launchers/stopping.sh; run "{sys.executable}" {tmp_path}/rank.py {tmp_path}'
    (tmp_path / "script").write_text(f"set -euo pipefail; {script}\n")
    assert ended_on_a_terminal_that_closes(["bash", f"{tmp_path}/script"], tmp_path / "ready-0", 60) == 75
    assert (tmp_path / "saved-0").read_text() == "SIGTERM"


def test_torchrun_waits_for_its_ranks_when_its_terminal_is_closed(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "pause_megatron.distributed.torchrun", "--nproc-per-node=2", "--standalone"]
    command += [str(tmp_path / "rank.py"), str(tmp_path)]
    assert ended_on_a_terminal_that_closes(command, tmp_path / "ready-1", 120) == 75
    assert {(tmp_path / f"saved-{rank}").read_text() for rank in range(2)} <= {"SIGHUP", "SIGTERM"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGPIPE])
def test_a_run_of_two_ranks_under_torchrun_stops_on_any_signal(corpus, tmp_path, number):
    """Send the signal to torchrun only; SIGPIPE, which Python ignores, to a rank."""
    config = tmp_path / "run.yaml"
    config.write_text(dump(run_config(corpus, tmp_path / "run", 1)))
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "pause_megatron.distributed.torchrun", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "pause_megatron", "pretrain", "--config", str(config), "train.steps=100000"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log) as torchrun:
        end = time.monotonic() + 200
        while not metrics.exists() or metrics.stat().st_size < 2000:
            assert time.monotonic() < end and torchrun.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        owner = json.loads((tmp_path / "run" / ".owner.json").read_text())
        os.kill(owner["process"] if number == signal.SIGPIPE else torchrun.pid, number)
        assert torchrun.wait(200) == EXIT_STOPPED, (tmp_path / "log").read_text()
    assert (
        Store(tmp_path / "run" / "checkpoints").steps()[-1] == json.loads(metrics.read_text().splitlines()[-1])["step"]
    )
