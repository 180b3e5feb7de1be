"""An experiment as SLURM jobs on a real cluster of two nodes: order, failure, resubmission."""

from __future__ import annotations

import logging
import re

import pytest
from support.slurm_cluster import Cluster, installed
from support.small_grid import cheap_cell, give_product, place_cells

from pause_megatron.experiment.folder import LocatedCell
from pause_megatron.experiment.slurm import JobOptions, job_in_queue, render, submit
from pause_megatron.experiment.stored import JobFile
from pause_megatron.slurm.commands import queued_jobs

pytestmark = pytest.mark.skipif(not installed(), reason="needs the Debian packages slurm-wlm and munge, and root")


@pytest.fixture(autouse=True)
def _its_commands(cluster: Cluster, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


def entries(placed: dict[str, LocatedCell]) -> dict[str, LocatedCell]:
    return {entry.cell.name: entry for entry in placed.values()}


def test_jobs_run_in_order_and_resubmission_covers_the_rest(cluster, tmp_path, caplog):
    a, d = cheap_cell("a"), cheap_cell("d")
    b = cheap_cell("b", a)
    placed = place_cells(tmp_path, [a, b, cheap_cell("c", b), d, cheap_cell("e", d)])
    named = entries(placed)
    for name in "abce":  # d fails: its verb writes no output
        give_product(named[name])

    caplog.set_level(logging.INFO, "pause_megatron")
    held = JobOptions(partition="main", time="10:00", lines=("--hold",))
    assert submit(tmp_path, placed, held) == 0
    said = caplog.messages
    assert said[-2].startswith("5 jobs submitted, 0 already queued, 0 cells done")
    jobs = {name: JobFile.read(entry.folder).job for name, entry in named.items()}
    assert said[1] == f"job {jobs['b']} after {jobs['a']}: b"
    assert all(job_in_queue(entry.folder, queued_jobs()) for entry in named.values())

    caplog.clear()
    submit(tmp_path, placed, held)
    assert caplog.messages[-2].startswith("0 jobs submitted, 5 already queued")

    cluster.run("scontrol", "release", ",".join(jobs.values()))
    cluster.wait_until_idle()
    assert {name: entry.done for name, entry in named.items()} == {**dict.fromkeys("abc", True), "d": False, "e": False}
    ends = [(named[name].folder / "done.json").stat().st_mtime_ns for name in "abc"]
    assert ends == sorted(ends)
    assert "got exit code 0 and nothing there" in (named["d"].folder / "job.txt").read_text()
    assert not (named["e"].folder / "job.txt").exists(), "e was started although d failed"

    give_product(named["d"])
    caplog.clear()
    submit(tmp_path, placed, JobOptions())
    assert caplog.messages[-2].startswith("2 jobs submitted, 0 already queued, 3 cells done")
    cluster.wait_until_idle()
    assert all(entry.done for entry in named.values())
    assert [(named[name].folder / "done.json").stat().st_mtime_ns for name in "abc"] == ends


def test_a_job_script_has_the_resources_of_the_options(tmp_path):
    folder = tmp_path / "with blanks"
    options = JobOptions(partition="gpu", time="4:00:00", nodes=2, gpus=1, cpus=8, lines=("--account=us",))
    script = render(folder, "pretrain", 16, options)
    for line in (
        "--nodes=2",
        "--ntasks-per-node=8",
        "--partition=gpu",
        "--gpus-per-task=1",
        "--cpus-per-task=8",
        "--account=us",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in script
    assert not re.search("@[A-Z_]+@", script) and "--nodes=1\n" in render(folder, "evaluate", 1, options)
