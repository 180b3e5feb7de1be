"""Runs as jobs of a real SLURM cluster of two nodes: preempted, killed, requeued in a save, and still the same run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, installed

from pause_megatron.checkpoint import Store
from pause_megatron.cli import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
TIMING = {"seconds", "tokens_per_second", "text_tokens_per_second", "mfu"}
ON_CPUS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")

pytestmark = [
    pytest.mark.slow,  # minutes of starting, requeueing and starting again
    pytest.mark.skipif(not installed(), reason="needs the Debian packages slurm-wlm and munge, and root"),
]


@pytest.fixture(autouse=True)
def _its_commands(cluster: Cluster, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    # Both nodes are this machine, whose resolver does not know them.
    for name, value in {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


def keys(corpus: str, folder: Path) -> list[str]:
    return [
        *("--recipe", "tiny-pause", f"data.prefix={corpus}", f"run.dir={folder / 'run'}", f"train.steps={STEPS}"),
        *("model.preset=null", "model.layers=2", "model.hidden=32", "model.heads=2", "data.sequence_length=64"),
        *("batch.global_size=8", "batch.micro_size=2", "optim.warmup_steps=2", "checkpoint.every=2"),
        *("validation.every=20", "validation.samples=8", "log.samples_every=0", "log.tensorboard=false"),
    ]


class Job:
    """A job of the cluster, in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, *command: str) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)
        self.number = cluster.run("sbatch", "--parsable", f"--chdir={folder}", *command).strip()

    @property
    def done(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.folder / "run" / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def state(self) -> str:
        return self.cluster.run("squeue", "--noheader", f"--jobs={self.number}", "--states=all", "--format=%T").strip()

    def wait(self, condition, what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.state()}\n{self.logs()}"
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.done >= step, f"step {step}")

    def start_again(self) -> None:
        """Waits until it is back in the queue, and spares it the two minutes that SLURM holds it."""
        self.wait(lambda: self.state() == "PENDING", "requeue")
        time.sleep(2)  # what slurmd says about the end of the former start must not be taken for that of the next
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def finish(self) -> None:
        self.wait(lambda: self.state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), "end")
        assert self.state() == "COMPLETED", self.logs()

    def processes(self, rank: int) -> list[int]:
        """Of a rank, on this machine."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdecimal() else []
                wanted = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()}
                if wanted <= set(variables) and b"pause_megatron" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended
        return found

    def logs(self) -> str:
        files = sorted(path for path in self.folder.rglob("*.txt") if path.is_file())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def final_state(folder: Path) -> dict[str, bytes]:
    last = Store(folder / "run" / "checkpoints").path(STEPS)
    return {path.name: path.read_bytes() for path in sorted(last.glob("state-*.safetensors"))}


@pytest.fixture(scope="module")
def straight(cluster, corpus, tmp_path_factory) -> Path:
    """`sbatch launchers/pretrain.sbatch`, not interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--wait", f"--chdir={folder}", *ON_CPUS, ROOT / "launchers" / "pretrain.sbatch"]
    subprocess.run([*command, *keys(corpus, folder)], env={**environment, **cluster.environment}, capture_output=True)
    texts = "\n".join(path.read_text()[-3000:] for path in sorted(folder.rglob("*.txt")))
    assert len(metrics(folder)) == STEPS, texts
    return folder


def test_preempted_killed_and_requeued_in_a_save_it_is_the_same_run(cluster, corpus, straight, tmp_path):
    job = Job(cluster, tmp_path, *ON_CPUS, str(ROOT / "launchers" / "pretrain.sbatch"), *keys(corpus, tmp_path))

    job.wait_for_step(3)
    cluster.run("scancel", "--signal=TERM", job.number)  # what preemption sends to the ranks
    job.start_again()
    first = job.done
    assert 3 <= first < STEPS and Store(tmp_path / "run" / "checkpoints").steps()[-1] == first

    job.wait_for_step(first + 4)
    [victim] = job.processes(rank=1)
    os.kill(victim, signal.SIGKILL)
    job.start_again()
    second = Store(tmp_path / "run" / "checkpoints").steps()[-1]
    assert first < second < STEPS

    log = tmp_path / "logs" / f"pretrain-{job.number}" / "rank-0000.txt"
    store = Store(tmp_path / "run" / "checkpoints")
    job.wait(lambda: f"resuming after step {second}" in log.read_text() and store.steps()[-1] > second, "a new save")
    job.wait(lambda: any(store.folder.glob(".incoming-*")), "another save")
    cluster.run("scontrol", "requeue", job.number)
    job.start_again()
    job.finish()

    assert metrics(tmp_path) == metrics(straight)
    assert final_state(tmp_path) == final_state(straight)
    (output,) = tmp_path.glob("pretrain-*.txt")
    assert re.findall(r"^start (\d) of job", output.read_text(), flags=re.MULTILINE) == ["0", "1", "2", "3"]
    assert f"resuming after step {first} from" in log.read_text()
    assert "SIGTERM: finishing the step, then saving" in log.read_text()


def test_torchrun_is_told_before_the_time_limit_and_says_75(cluster, corpus, straight, tmp_path, capsys):
    job = Job(cluster, tmp_path, script(corpus, tmp_path, "torchrun", capsys))
    job.wait_for_step(3)
    cluster.run("scancel", "--batch", "--signal=USR2", job.number)  # what SLURM sends to the script before the limit
    job.start_again()
    assert 3 <= job.done < STEPS
    job.finish()
    assert metrics(tmp_path) == metrics(straight)
    assert final_state(tmp_path) == final_state(straight)


def test_deepspeed_over_slurm_gives_the_same_losses_and_a_cancelled_job_stays_away(
    cluster, corpus, straight, tmp_path, capsys
):
    cancelled = Job(cluster, tmp_path / "cancelled", script(corpus, tmp_path / "cancelled", "deepspeed", capsys))
    cancelled.wait_for_step(2)
    cluster.run("scancel", cancelled.number)
    job = Job(cluster, tmp_path / "whole", script(corpus, tmp_path / "whole", "deepspeed", capsys))
    job.finish()
    assert metrics(tmp_path / "whole") == metrics(straight)
    assert final_state(tmp_path / "whole") == final_state(straight)
    assert cancelled.state() == "CANCELLED"
    assert Store(cancelled.folder / "run" / "checkpoints").steps()[-1] == cancelled.done < STEPS


def script(corpus: str, folder: Path, launcher: str, capsys) -> str:
    """A job script that `launch` writes."""
    folder.mkdir(exist_ok=True)
    options = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "20:00"]
    assert main(["launch", *options, "--launcher", launcher, "--partition", "main", *keys(corpus, folder)]) == 0
    path = folder / "job.sbatch"
    path.write_text(capsys.readouterr().out)
    return str(path)


def test_launch_refuses_what_this_cluster_does_not_have(corpus, tmp_path, capsys):
    for options, message in (
        (["--partition", "mian"], "--partition: expected one of main; came 'mian'. Did you mean 'main'?"),
        ([], "--partition main: expected nodes with GPUs, sinfo shows none there"),
        (["--gpus-per-node", "0", "--tasks-per-node", "1", "--nodes", "4"], "--nodes: expected at most 2"),
    ):
        assert main(["launch", *keys(corpus, tmp_path), "batch.global_size=16", *options]) == 2
        assert message in capsys.readouterr().err


def test_launch_submits(cluster, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--sbatch=--hold", "--submit"]
    assert main(["launch", *keys(corpus, tmp_path), *options]) == 0
    number = re.search(r"job (\d+): 2 ranks on 2 nodes", capsys.readouterr().err)[1]
    assert cluster.run("squeue", "--noheader", f"--jobs={number}", "--format=%j %D").split() == ["pretrain", "2"]
    cluster.run("scancel", number)
