"""Job scripts: what launchers/ ships is what the template gives, for every launcher and container."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from pause_megatron.cli import main
from pause_megatron.errors import ConfigError
from pause_megatron.slurm.script import LAUNCHERS, TEMPLATE, TrainingJob, render_experiment, render_training


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch, tmp_path_factory):
    empty = tmp_path_factory.mktemp("slurm") / "slurm.conf"  # one that is missing is waited for
    empty.touch()
    monkeypatch.setenv("SLURM_CONF", str(empty))


LAUNCHER_FILES = Path(__file__).resolve().parents[3] / "launchers"


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "experiment"])
def test_the_shipped_scripts_are_what_the_template_gives(verb):
    expected = render_experiment() if verb == "experiment" else render_training(TrainingJob(verb))
    path = LAUNCHER_FILES / f"{verb}.sbatch"
    assert path.read_text() == expected
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("container", [None, "pyxis:nvcr.io#nvidia/pytorch:25.01-py3", "apptainer:/images/a b.sif"])
def test_every_script_is_bash_and_asks_for_its_ranks(launcher, container):
    job = TrainingJob("pretrain", ("data.prefix=a b",), nodes=3, tasks_per_node=4, gpus_per_node=4, launcher=launcher)
    job = TrainingJob(
        **{**vars(job), "container": container, "partition": "p", "time": "1:00:00", "lines": ("--qos=high",)}
    )
    if launcher == "deepspeed" and container:
        with pytest.raises(ConfigError, match="not with --launcher deepspeed"):
            render_training(job)
        return
    script = render_training(job)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for directive in (
        "nodes=3",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "partition=p",
        "time=1:00:00",
        "mem=0",
        "exclusive",
        "qos=high",
        "requeue",
    ):
        assert f"#SBATCH --{directive}\n" in script
    assert "'data.prefix=a b'" in script
    assert ("--container-image='nvcr.io#nvidia/pytorch:25.01-py3'" in script) == (container or "").startswith("pyxis")
    assert ("apptainer exec --nv" in script) == (container or "").startswith("apptainer")


def test_the_readme_s_launch_lines_run(capsys):
    text = (LAUNCHER_FILES / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("pause-megatron launch")]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line.partition(">")[0])[1:]
        assert main([word for word in words if word != "--submit"]) == 0
        assert "--ntasks-per-node=8" in capsys.readouterr().out


def test_a_site_keeps_a_template_of_its_own(tmp_path, capsys):
    own = tmp_path / "site.sbatch"
    own.write_text(TEMPLATE.read_text().replace("set -uo pipefail", "set -uo pipefail\nmodule load cuda/12"))
    command = ["launch", "--recipe", "tiny-pause", "--gpus-per-node", "2", "--template", str(own)]
    assert main(command) == 0
    assert "\nmodule load cuda/12\n" in capsys.readouterr().out
    own.write_text("#!/bin/bash\n@PROGRAM@\n")
    assert main(command) == 2
    assert (
        "expected the marks of job.sbatch, got none of @ABOUT@, @DIRECTIVES@, @SETUP@, @FORWARD@"
        in capsys.readouterr().err
    )


def test_launch_refuses_what_cannot_run_and_warns_of_what_is_slow(tmp_path, capsys):
    hosts = tmp_path / "hostfile"
    hosts.write_text("n1 slots=8\nn2 slots=4\n")
    base = ["launch", "--recipe", "c4-1b-pause", "--nodes", "2"]
    for options, message in (
        (["--time", "9:00"], "--time 9:00: expected at least 600 s"),
        (["--time", "soon"], "--time: expected MINUTES"),
        (["--launcher", "mpi"], "--launcher: expected one of srun, torchrun, deepspeed, got 'mpi'"),
        (["--container", "docker:x"], "--container: expected pyxis:IMAGE or apptainer:IMAGE"),
        (["--gpus-per-node", "0"], "--tasks-per-node: expected the ranks per node"),
        (["--tasks-per-node", "3"], "--tasks-per-node: expected a rank for each of 8 GPUs, got 3"),
        (["--hostfile", str(hosts)], "--hostfile: belongs to --launcher deepspeed"),
        (["--hostfile", str(hosts), "--launcher", "deepspeed"], "expected 2 hosts with 8 slots each"),
        (["parallel.tensor=3"], "parallel.tensor"),
        (["--gpu", "h1000"], "h1000"),
        (["checkpoint.before_end_seconds=1"], "checkpoint.before_end_seconds=1: expected at least"),
    ):
        assert main([*base, *options]) == 2, options
        assert message in capsys.readouterr().err
    too_large = [
        "launch",
        "--recipe",
        "c4-7b-pause",
        "--gpu",
        "a100-40",
        "engine.ds_config=zero1",
        "engine.zero_stage=null",
    ]
    assert main(too_large) == 2
    error = capsys.readouterr().err
    assert "the run does not fit: " in error and "GiB on a100-40. Any of these would:\n  " in error
    assert main([*base, "parallel.tensor=16", "data.prefix=no/where"]) == 0
    warned = capsys.readouterr().err
    assert "warning: parallel.tensor=16 does not divide the 8 ranks of a node" in warned
    assert "warning: data.prefix: no corpus at no/where on this machine\n" in warned
    scored = ["task.name=gsm8k", "finetune.answer_placement=scored", "task.scores=no/file"]
    assert main([*base, *scored, "data.tokenizer=t"]) == 0
    assert "warning: task.scores: no file at no/file on this machine\n" in capsys.readouterr().err
    assert main([*base, "checkpoint.before_end_seconds=900", "--time", "2:00:00"]) == 0
    assert "#SBATCH --signal=B:USR2@900\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_without_slurm_a_script_is_written_and_what_was_not_checked_is_said(option, tmp_path, capsys, monkeypatch):
    command = ["launch", "--recipe", "tiny-pause", "--gpus-per-node", "2", "--time", "1:00:00", "data.prefix=x"]
    share = {"cpus_per_task": 8, "mem": None, "exclusive": False}  # two GPUs of a node that is taken to have eight
    job = TrainingJob("pretrain", (*command[1:3], "data.prefix=x"), 1, 2, 2, time="1:00:00", **share)
    expected = render_training(job)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*command, *option]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    unchecked = (
        "the site is not checked (partition, its GPUs, CPUs, memory, nodes and time limit): sinfo: not found on PATH"
    )
    assert f"pause-megatron: {unchecked}, SLURM is not installed here\n" in err


def test_a_user_says_what_a_job_takes_of_a_node(capsys):
    command = ["launch", "--recipe", "tiny-pause", "--gpus-per-node", "2", "data.prefix=x"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=8\n" in out and "--mem" not in out and "--exclusive" not in out
    assert main([*command, "--cpus-per-task", "12", "--mem", "200G", "--exclusive"]) == 0
    out = capsys.readouterr().out
    assert all(f"#SBATCH --{line}\n" in out for line in ("cpus-per-task=12", "mem=200G", "exclusive"))
    assert "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} " in out
    on_cpus = ["--gpus-per-node", "0", "--tasks-per-node", "4", "--cpus-per-task", "6"]
    assert main([*command, *on_cpus]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=6\n" in out and "gpus" not in out and "--exclusive" not in out
    assert "OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} " in out  # a rank computes on its CPUs
    assert main([*command, "--mem", "plenty"]) == 2
    assert (
        "--mem: expected a size as sbatch takes it, for example 0 (all) or 200G, got 'plenty'"
        in capsys.readouterr().err
    )


def test_without_slurm_nothing_is_submitted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["launch", "--recipe", "tiny-pause", "--gpus-per-node", "2", "data.prefix=x", "--submit"]
    assert main(command) == 2
    no_sbatch = "--submit: expected sbatch on PATH, got none; leave --submit out to write the script"
    assert capsys.readouterr() == ("", f"pause-megatron: error: {no_sbatch}\n")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho submitted >&2; exit 9\n")
    sbatch.chmod(0o755)
    said = "pause-megatron: error: --submit: SLURM does not answer, nothing was submitted. sinfo: "
    assert main(command) == 2  # a part of SLURM is not enough to check the site
    assert capsys.readouterr() == ("", f"{said}not found on PATH, SLURM is not installed here\n")
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1\n")
    sinfo.chmod(0o755)
    assert main(command) == 2
    assert capsys.readouterr() == ("", f"{said}fatal: Could not establish a configuration source\n")
