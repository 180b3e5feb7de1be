"""What SLURM itself makes of a job's options, and ranks that a batch script tells a wrong number."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import slurm_cluster

from pause_megatron.slurm.script import TrainingJob, render_training

pytestmark = pytest.mark.skipif(not slurm_cluster.installed(), reason="needs slurm-wlm and munge, and root")


@pytest.mark.parametrize(
    "text",
    [
        "two words",
        "it's \"quoted\" 'twice' \\ and \\\\ back",
        "$(touch broken) `touch broken`; touch broken & #SBATCH --nodes=2",
        "# not a comment",
        "-x --nodes=2 é",
    ],
)
def test_sbatch_reads_names_and_comments_as_they_were_written(text, cluster, tmp_path):
    from pause_megatron.slurm.quoting import directive

    name = text.replace("\\", "")  # files are named by it
    job = TrainingJob("pretrain", ("a=b",), 1, 1, 0, name=name, lines=(directive("comment", text), "--hold"), mem=None)
    script = tmp_path / "job.sbatch"
    script.write_text(render_training(job))
    number = cluster.run("sbatch", "--parsable", f"--chdir={tmp_path}", str(script)).strip()
    try:
        shown = cluster.run("squeue", "--noheader", f"--jobs={number}", "--format=%j|%k|%D").strip()
        assert shown == f"{name}|{text}|1"
    finally:
        cluster.run("scancel", number)
    assert [path.name for path in tmp_path.iterdir()] == ["job.sbatch"]


def test_a_rank_exported_by_a_batch_script_is_an_error_beside_srun(cluster, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --ntasks=2\n#SBATCH --output=out.txt\n"
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID\n"
        "export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))\n"
        f"srun {sys.executable} -m pause_megatron pretrain --recipe tiny-pause --dry-run\n"
    )
    environment = f"ALL,PYTHONPATH={Path(__file__).resolve().parents[2]}"
    words = ["sbatch", "--parsable", f"--export={environment}", f"--chdir={tmp_path}", str(script)]
    cluster.run(*words)
    cluster.wait_until_idle(60)
    text = (tmp_path / "out.txt").read_text()
    assert "error: rank 1 on " in text and "RANK equal to SLURM_PROCID=1 in a step of 2 tasks" in text, text
    assert "run.connect_seconds" not in text
