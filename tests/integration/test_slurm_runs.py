"""Runs as jobs of a real SLURM cluster of two nodes: preemption, kills, requeue during a save, and hangs in one run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forked_ranks import TIMING
from support.slurm_cluster import Cluster, installed
from support.slurm_job import EndedTooSoonError, Job
from support.small_grid import write_records
from support.tiny_config import tiny_model

from pause_megatron.cli import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = (60, 300, 1500)  # a machine that is through before it could be hit gets more of them
# On a GPU node the shipped scripts take all of it; here jobs share two small ones.
ON_ONE_CPU = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--oversubscribe")
ON_CPUS = (*ON_ONE_CPU, "--nodes=2")

pytestmark = pytest.mark.skipif(not installed(), reason="needs the Debian packages slurm-wlm and munge, and root")


@pytest.fixture(scope="module", autouse=True)
def _its_commands(cluster: Cluster):
    with pytest.MonkeyPatch.context() as patch:
        # Both nodes are this machine, whose resolver does not know them.
        job = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name, value in {**cluster.environment, **job}.items():
            patch.setenv(name, value)
        yield


def keys(corpus: str, folder: Path, steps: int) -> list[str]:
    return [
        *("--recipe", "tiny-pause", f"data.prefix={corpus}", f"run.dir={folder / 'run'}", f"train.steps={steps}"),
        *tiny_model(layers=2, hidden=32, heads=2),
        "data.sequence_length=64",
        *("batch.global_size=8", "batch.micro_size=2", "optim.warmup_steps=2", "checkpoint.every=2"),
        *("validation.every=20", "validation.samples=8", "log.samples_every=0", "log.tensorboard=false"),
    ]


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_run(job: Job, straight: Job) -> None:
    """Equal metrics, and equal last checkpoints."""
    straight.finish()
    assert straight.starts == 1, straight.logs()
    assert metrics(job.folder) == metrics(straight.folder)
    newest = [each.store.path(each.store.steps()[-1]) for each in (job, straight)]
    states = [sorted(folder.glob("state-*.safetensors")) for folder in newest]
    assert [path.name for path in states[0]] == [path.name for path in states[1]] != []
    for one, other in zip(*states, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.fixture(scope="module")
def straight(cluster, corpus, tmp_path_factory) -> Callable[[int], Job]:
    """Return the uninterrupted run of N steps, started once with DeepSpeed's launcher."""
    jobs: dict[int, Job] = {}

    def begin(steps: int) -> Job:
        if steps not in jobs:
            folder = tmp_path_factory.mktemp(f"straight-{steps}")
            jobs[steps] = Job(cluster, folder, script(corpus, folder, steps, "deepspeed"))
        return jobs[steps]

    return begin


def with_enough_steps(scenario: Callable[[int], Job]) -> tuple[int, Job]:
    """Play a scenario on a run that is long enough for it; its steps and its job."""
    for steps in STEPS:
        try:
            return steps, scenario(steps)
        except EndedTooSoonError:
            continue
    raise AssertionError(f"{STEPS[-1]} steps are over before they can be interrupted")


def test_preempted_killed_requeued_in_a_save_and_hung_it_is_the_same_run(cluster, corpus, straight, tmp_path):
    def scenario(steps: int) -> Job:
        folder = tmp_path / str(steps)
        words = [*keys(corpus, folder, steps), "run.hang_seconds=5"]
        job = Job(cluster, folder, *ON_CPUS, str(ROOT / "launchers" / "pretrain.sbatch"), *words)
        job.wait_for_steps(3)
        job.hit(lambda: cluster.run("scancel", "--signal=TERM", job.number), "preemption's signal to the ranks")
        job.wait_for_steps(3)
        job.hit(lambda: job.signal(signal.SIGKILL, 1), "kill -9 of a node's processes")
        job.wait_for_steps(3)
        job.freeze_in_a_save()
        job.hit(lambda: cluster.run("scontrol", "requeue", job.number), "scontrol requeue in a save")
        job.wait_for_steps(3)
        straight(steps)  # has the processors to itself while the others hang
        job.hit(lambda: job.signal(signal.SIGSTOP, 1), "a hang")
        job.finish()
        return job

    steps, job = with_enough_steps(scenario)
    assert_same_run(job, straight(steps))
    assert job.starts >= 5  # a machine that is slow enough looks hung by itself
    assert job.stopped()[0] == job.resumed()[0], "a step was lost"
    log = (job.folder / "logs" / f"pretrain-{job.number}" / "rank-0000.txt").read_text()
    assert "SIGTERM: finishing the step, then saving" in log
    assert "nothing for 5 s (run.hang_seconds)" in log and "ranks that do not answer at all: 1 (on " in log


def test_torchrun_stops_before_the_time_limit_and_scancel_ends_the_job(cluster, corpus, straight, tmp_path):
    def scenario(steps: int) -> Job:
        folder = tmp_path / str(steps)
        folder.mkdir()
        job = Job(cluster, folder, script(corpus, folder, steps, "torchrun"))
        job.wait_for_steps(3)
        # What SLURM sends to the script before the limit.
        job.hit(lambda: cluster.run("scancel", "--batch", "--signal=USR2", job.number), "the limit's signal")
        job.wait_for_steps(3)
        cluster.run("scancel", job.number)
        cluster.wait_until_idle()
        if job.state() == "COMPLETED":
            raise EndedTooSoonError("scancel")
        assert (job.state(), job.starts) == ("CANCELLED", 2), job.logs()
        again = Job(cluster, folder, script(corpus, folder, steps, "srun"))  # another launcher goes on
        again.finish()
        return again

    steps, job = with_enough_steps(scenario)
    assert_same_run(job, straight(steps))
    assert job.stopped() == job.resumed() and len(job.stopped()) == 2, "a step was lost"


def test_a_time_limit_without_room_for_a_step_and_a_save_is_refused_for_good(cluster, corpus, tmp_path):
    words = [str(ROOT / "launchers" / "pretrain.sbatch"), *keys(corpus, tmp_path, 60)]
    job = Job(cluster, tmp_path, *ON_ONE_CPU, "--time=4:00", *words)
    job.wait(lambda: job.state() == "FAILED", "its end")
    assert "checkpoint.before_end_seconds=300: expected less than the job's time" in job.logs()
    assert (job.starts, job.done) == (1, 0)


def test_it_is_finetuned(cluster, straight, tmp_path):
    pretrained = straight(STEPS[0])
    pretrained.finish()
    words = [
        *(
            "--recipe",
            "finetune-web_questions",
            f"model.from={pretrained.folder / 'run'}",
            f"run.dir={tmp_path / 'run'}",
        ),
        *(f"task.path={write_records(tmp_path) / 'webquestions'}", "train.steps=2", "optim.warmup_steps=1"),
        *("batch.global_size=2", "finetune.pauses=3", "validation.every=0", "log.tensorboard=false"),
    ]
    job = Job(cluster, tmp_path, *ON_ONE_CPU, str(ROOT / "launchers" / "finetune.sbatch"), *words)
    job.finish()  # in a folder without the repository: the scripts need the installed package alone
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2] and job.starts == 1, job.logs()


def script(corpus: str, folder: Path, steps: int, launcher: str, *options: str) -> str:
    """A job script that `launch` writes."""
    options = ("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "20:00", *options)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert (
            main(["launch", *options, "--launcher", launcher, "--partition", "main", *keys(corpus, folder, steps)]) == 0
        )
    (folder / "job.sbatch").write_text(text.getvalue())
    return str(folder / "job.sbatch")


def test_launch_refuses_what_this_cluster_does_not_have(corpus, tmp_path, capsys):
    on_cpus = ["--gpus-per-node", "0", "--tasks-per-node", "1"]
    for options, message in (
        (["--partition", "mian"], "--partition: expected one of main, short; got 'mian'. Did you mean 'main'?"),
        ([], "--partition main: expected nodes with GPUs, got none from sinfo"),
        ([*on_cpus, "--nodes", "4"], "--nodes: expected at most 2"),
        ([*on_cpus, "--cpus-per-task", "5"], "--cpus-per-task: expected at most 4 CPUs for the ranks of a node"),
        (
            [*on_cpus, "--partition", "short"],
            "--time: not given, 540 s by default in partition short: expected at least",
        ),
        ([*on_cpus, "--partition", "short", "--time", "1:00:00"], "--time: expected at most 540 s"),
    ):
        assert main(["launch", *keys(corpus, tmp_path, 60), "batch.global_size=16", *options]) == 2
        assert message in capsys.readouterr().err


def test_launch_submits(cluster, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--sbatch=--hold", "--submit"]
    assert main(["launch", *keys(corpus, tmp_path, 60), *options]) == 0
    number = re.search(r"job (\d+): 2 ranks on 2 nodes", capsys.readouterr().err)[1]
    assert cluster.run("squeue", "--noheader", f"--jobs={number}", "--format=%j %D").split() == ["pretrain", "2"]
    cluster.run("scancel", number)


# In place of the program, before it imports anything: what its rank was given.
SAYS_ITS_SHARE = """
import json, os, sys
before, verb, _ = " ".join(sys.orig_argv).partition(" pretrain ")
if verb and "torchrun" not in before and "deepspeed" not in before:
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_CPUS_ON_NODE", "SLURM_NODEID", "SRUN_CPUS_PER_TASK")
    print("share", json.dumps({name: os.environ.get(name) for name in names}), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_every_rank_gets_its_cpus(launcher, cluster, corpus, tmp_path):
    """Two nodes, two ranks each with two CPUs; the job has them all, and so has the step that starts the ranks."""
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "sitecustomize.py").write_text(SAYS_ITS_SHARE)
    options = ("--tasks-per-node", "2", "--cpus-per-task", "2", "--mem", "0")
    text = Path(script(corpus, tmp_path, 60, launcher, *options)).read_text()
    assert "#SBATCH --cpus-per-task=2\n" in text and "#SBATCH --mem=0\n" in text
    (tmp_path / "job.sbatch").write_text(
        text.replace("logs=", f"export PYTHONPATH={tmp_path / 'probe'}:{ROOT}\nlogs=", 1)
    )
    job = Job(cluster, tmp_path, str(tmp_path / "job.sbatch"))
    job.finish()
    shares = [json.loads(line) for line in re.findall(r"^share (.*)$", job.logs(), flags=re.MULTILINE)]
    assert len(shares) == 4, job.logs()
    # srun and DeepSpeed start a task for each rank, torchrun one for each node; in each way both ranks have all CPUs.
    tasks = "2" if launcher == "torchrun" else "4"
    assert {(share["SLURM_STEP_NUM_TASKS"], share["SLURM_CPUS_ON_NODE"]) for share in shares} == {(tasks, "4")}
    assert sorted(share["SLURM_NODEID"] for share in shares) == ["0", "0", "1", "1"]
    # By which srun binds a task, on clusters that bind (this one has no cgroups to do it with).
    bound = None if launcher == "torchrun" else "2"
    assert {share["SRUN_CPUS_PER_TASK"] for share in shares} == {bound}


def test_what_is_submitted_from_a_step_is_one_rank(cluster, tmp_path):
    """A batch script, and a shell of `salloc`: both inherit the variables of the step, which has two."""
    (tmp_path / "says.py").write_text(
        "import sys\nfrom pause_megatron.distributed.ranks import discover\n"
        "print(discover().world_size, file=open(sys.argv[1], 'w'))\n"
    )
    for name in ("batch", "salloc", "step"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{sys.executable} says.py {name}.txt; exit $?\n")
        (tmp_path / name).chmod(0o755)
    submits = "case $SLURM_PROCID in 0) ./step; sbatch --wait --output=log ./batch; salloc --ntasks=1 ./salloc;; esac"
    given = ["env", f"PYTHONPATH={ROOT}", "MASTER_ADDR=127.0.0.1"]
    cluster.run("srun", "--ntasks=2", "--nodes=2", f"--chdir={tmp_path}", *given, "sh", "-c", submits)
    said = {path.stem: path.read_text().strip() for path in tmp_path.glob("*.txt")}
    assert said == {"step": "2", "batch": "1", "salloc": "1"}
