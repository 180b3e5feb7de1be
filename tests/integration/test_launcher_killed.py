"""kill -9 of only the launcher, at any moment: no rank is alive ten seconds later, and the next start resumes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked_ranks import STEPS, finish, metrics, run_config, start
from support.slurm_cluster import installed

from pause_megatron.checkpoint import Store
from pause_megatron.config.load import dump
from pause_megatron.host.processes import words

ROOT = Path(__file__).resolve().parents[2]
LATEST_END = 10.0
FULL_KILLS = 20
LONGER = 4000  # steps of a run that is killed many times


def command(launcher: str, config: Path, output: Path, port: int) -> list[str]:
    verb = ["pretrain", "--config", str(config)]
    return {
        "torchrun": ["torchrun", "--nproc_per_node=2", f"--master_port={port}", "-m", "pause_megatron", *verb],
        "own-torchrun": [
            *("python", "-m", "pause_megatron.distributed.torchrun", "--nproc_per_node=2"),
            *(f"--master_port={port}", "-m", "pause_megatron", *verb),
        ],
        "deepspeed": ["deepspeed", "--num_gpus=2", f"--master_port={port}", "--module", "pause_megatron", *verb],
        # Each into its own file, which the daemons write: what goes through srun is lost with it.
        "srun": [
            *("srun", "--job-name=killed", "--nodes=2", "--ntasks=2", f"--output={output}-%t"),
            *("python", "-m", "pause_megatron", *verb),
        ],
    }[launcher]


@contextlib.contextmanager
def launched(launcher: str, config: Path, output: Path, more: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A launcher with two ranks; processes that remain at the end are killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}
    with open(output, "a") as log:
        process = subprocess.Popen(
            command(launcher, config, output, port),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=config.parent,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in ranks_of(config):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if launcher == "srun":  # an allocation that an srun has made for itself stays when that one is killed
                give_back(environment)


def give_back(environment: dict[str, str]) -> None:
    """Cancel the remaining SLURM jobs."""
    end = time.monotonic() + 60
    subprocess.run(["scancel", "--name=killed"], env=environment, check=True)
    left = ["squeue", "--noheader", "--name=killed", "--format=%T"]
    while subprocess.run(left, env=environment, check=True, capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.1)


def ranks_of(config: Path) -> list[int]:
    """Return the running processes that a launcher has started as ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(config).encode() not in (process / "cmdline").read_bytes().split(b"\0"):
                continue
            names = {each.partition(b"=")[0] for each in (process / "environ").read_bytes().split(b"\0")}
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if names & {b"RANK", b"SLURM_STEP_NUM_TASKS"} and state not in "ZX":
            found.append(int(process.name))
    return found


class Moments:
    """Wait for the moment of the kill: two ranks exist, a step, or a save; then a delay."""

    def __init__(self, config: Path, output: Path) -> None:
        self._config, self._output = config, output
        self._run = config.parent / "run"

    def wait(self, moment: str, launcher: subprocess.Popen, later: float) -> None:
        before = self._steps()
        there = {
            "start": lambda: len(ranks_of(self._config)) == 2,
            "step": lambda: self._steps() > before + 1,
            "save": lambda: self._steps() > before + 1 and any((self._run / "checkpoints").glob(".incoming-*")),
        }[moment]
        end = time.monotonic() + 120
        while not there():
            assert time.monotonic() < end and launcher.poll() is None, said(self._output)[-4000:]
            time.sleep(0.001)
        time.sleep(later)

    def _steps(self) -> int:
        path = self._run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


def kill_the_launcher(process: subprocess.Popen, config: Path) -> float:
    """Return the seconds until the last rank has exited."""
    began = time.monotonic()
    # Only the launcher is in this group, and srun's own guard, which would have SLURM end the step.
    if "srun" in " ".join(words(process.pid)):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    while ranks_of(config):
        assert time.monotonic() < began + LATEST_END, "ranks have outlived their launcher"
        time.sleep(0.05)
    return time.monotonic() - began


def said(output: Path) -> str:
    """Return the output of the launcher and the ranks."""
    return "".join(path.read_text() for path in sorted(output.parent.glob(f"{output.name}*")))


def written(config, folder: Path) -> Path:
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(dump(config))
    return path


def slurm(request: pytest.FixtureRequest, launcher: str) -> dict[str, str]:
    if launcher != "srun":
        return {}
    if not installed():
        pytest.skip("needs the Debian packages slurm-wlm and munge, and root")
    return {**request.getfixturevalue("cluster").environment, "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(("launcher", "moment"), [("own-torchrun", "save"), ("deepspeed", "start"), ("srun", "start")])
def test_no_rank_outlives_its_launcher(corpus, tmp_path, request, launcher, moment):
    folder, output = tmp_path / "killed", tmp_path / "log"
    config = run_config(corpus, folder / "run", 1)
    path = written(config, folder)
    with launched(launcher, path, output, slurm(request, launcher)) as process:
        Moments(path, output).wait(moment, process, 0.0)
        kill_the_launcher(process, path)
    text = said(output)
    if moment == "start":
        assert "the launcher has exited: " in text and ("killed" in text or "stopping (set" in text)
        assert not (folder / "run" / "checkpoints").exists()
        return
    # There was time for the step and a save, so no step is lost.
    saved = Store(folder / "run" / "checkpoints").newest_complete()[1].progress["step"]
    assert saved == metrics(folder / "run")[-1]["step"] < STEPS
    assert f"stopped after step {saved} (the launcher has exited)" in text
    following = tmp_path / "following.log"
    finish(start(config, following), following)
    assert f"resuming after step {saved} from" in following.read_text()
    assert [line["step"] for line in metrics(folder / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_a_launcher_killed_at_twenty_moments(corpus, tmp_path, request, launcher):
    """One run, killed repeatedly; each start resumes from the newest complete checkpoint."""
    folder, output, rng = tmp_path / "killed", tmp_path / "log", random.Random(launcher)
    config = run_config(corpus, folder / "run", 1)
    path = written(config, folder)
    longer = path.read_text().replace(f"steps: {STEPS}\n", f"steps: {LONGER}\n")
    path.write_text(re.sub(r"\n  tokens: \d+", "", longer))
    moments, longest, newest = Moments(path, output), 0.0, 0
    for number in range(FULL_KILLS):
        moment = ("start", "step", "save")[number % 3]
        for path_of_before in tmp_path.glob("log*"):
            path_of_before.unlink()
        with launched(launcher, path, output, slurm(request, launcher)) as process:
            moments.wait(moment, process, rng.uniform(0, 6.0 if moment == "start" else 0.05))
            seconds = kill_the_launcher(process, path)
        print(f"{launcher}, kill {number + 1} ({moment}): the last rank ended after {seconds:.1f} s", flush=True)
        longest = max(longest, seconds)
        text = said(output)
        assert "held by" not in text and "Traceback" not in text, text[-4000:]
        if newest and moment != "start":
            assert f"resuming after step {newest} from" in text
        complete = Store(folder / "run" / "checkpoints").newest_complete() if moment != "start" or newest else None
        newest = complete[1].progress["step"] if complete else 0
    print(f"{launcher}: {FULL_KILLS} kills, the last rank ended after at most {longest:.1f} s; {newest} steps done")
