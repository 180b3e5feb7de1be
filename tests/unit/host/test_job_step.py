"""Whether the variables of a step are this process's own: real processes with the titles of SLURM's daemons."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pause_megatron.host import job_step

ROOT = Path(__file__).resolve().parents[3]
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_LOCALID": "0"}
STEP |= {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
SAYS = """
from pause_megatron.distributed.ranks import discover, discover_task
from pause_megatron.host.launcher_search import find
assert discover() == discover_task()
print(discover().world_size, [*find().listeners], find().gone)
"""
# The daemon starts a shell, which starts the program.
DAEMON = 'exec -a "slurmstepd: $TITLE" bash -c "$0 -c \'$1\'; exit $?"'


@pytest.mark.parametrize(
    ("title", "more", "size"),
    [
        ("[7.0]", {}, 4),
        ("[7+1.0]", {"SLURM_HET_SIZE": "2", "SLURM_JOB_ID": "6"}, 4),
        ("[7.batch]", {}, 1),
        ("[7.4294967291]", {}, 1),  # likewise, by number
        ("[7.interactive]", {}, 1),
        ("[6.0]", {}, 1),  # `salloc` in a step of job 6
        ("[7.batch]", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 2),  # torchrun in the batch script
    ],
)
def test_what_a_step_submits_is_not_in_the_step(title, more, size):
    """And does not end with its srun, which listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as srun:
        launched = {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_STEP_LAUNCHER_PORT": str(srun.getsockname()[1])}
        given = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT), "TITLE": title}
        done = subprocess.run(
            ["bash", "-c", DAEMON, sys.executable, SAYS],
            env={**os.environ, **STEP, **launched, **given, **more},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout == f"{size} {['srun'] if size == 4 else []} []\n", done.stderr


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ("0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0\n", ("7", "batch")),
        ("4:memory:/slurm/uid_1000/job_12/step_3/task_0\n1:name=systemd:/\n", ("12", "3")),
        ("0::/user.slice\n", None),
    ],
)
def test_the_cgroup_names_the_step_where_the_daemon_is_hidden(group, found, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: group)
    monkeypatch.setattr(job_step.processes, "ancestors", lambda: iter(()))
    assert job_step.own_step() == found
