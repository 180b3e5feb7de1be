"""The SLURM job step of this process. A job that is submitted from a step inherits that step's variables."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pause_megatron.host import processes

_FIRST_SPECIAL = 0xFFFFFFF0  # numbers of special steps, such as that of a batch script
_CGROUP = re.compile(r"/job_(\d+)/step_(\w+)(?:/|$)", re.MULTILINE)
_DAEMON_TITLE = re.compile(r"slurmstepd: \[(\d+)(?:\+\d+)?\.(\w+)")


def own_variables() -> Mapping[str, str]:
    """Return the environment, without SLURM_STEP_* where they are inherited from another step."""
    if not is_inherited(os.environ):
        return os.environ
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_STEP")}


def is_inherited(env: Mapping[str, str]) -> bool:
    """Return whether SLURM_STEP_* are those of another step than this process's; False where its step is not known.

    Args:
        env: Environment variables.
    """
    own = own_step() if "SLURM_STEP_NUM_TASKS" in env else None
    if own is None:
        return False
    job, step = own
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL:  # a batch script, or the shell of an allocation
        return True
    # A shell of `salloc` in another job's step. The components of a heterogeneous job have numbers of their own.
    return env.get("SLURM_JOB_ID") != job and not any(name.startswith("SLURM_HET") for name in env)


def own_step() -> tuple[str, str] | None:
    """Return job and step, by this process's control group, or by the title of the daemon that started it."""
    with contextlib.suppress(OSError):
        if found := _CGROUP.search(Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")):
            return found[1], found[2]
    for pid in processes.ancestors():
        if found := _DAEMON_TITLE.match([*processes.words(pid), ""][0]):
            return found[1], found[2]
    return None
