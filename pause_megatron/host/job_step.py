"""Which step of SLURM this process is in. What is submitted from a step inherits the variables of that one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pause_megatron.host import processes

_FIRST_SPECIAL = 0xFFFFFFF0  # a batch script's step, and the like, by number
_OF_A_GROUP = re.compile(r"/job_(\d+)/step_(\w+)(?:/|$)", re.MULTILINE)
_OF_THE_DAEMON = re.compile(r"slurmstepd: \[(\d+)(?:\+\d+)?\.(\w+)")


def own_variables() -> Mapping[str, str]:
    """The environment, without SLURM_STEP_* where they are inherited."""
    if not is_inherited(os.environ):
        return os.environ
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_STEP")}


def is_inherited(env: Mapping[str, str]) -> bool:
    """Whether the variables of a step are not those of the step that this process is in; False where it is not seen."""
    seen = _seen() if "SLURM_STEP_NUM_TASKS" in env else None
    if seen is None:
        return False
    job, step = seen
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL:  # a batch script, or the shell of an allocation
        return True
    # A shell of `salloc` in another job's step. The jobs of a heterogeneous one have numbers of their own.
    return env.get("SLURM_JOB_ID") != job and not any(name.startswith("SLURM_HET") for name in env)


def _seen() -> tuple[str, str] | None:
    """Job and step, by the control group of this process, or by the title of the daemon that has started it."""
    with contextlib.suppress(OSError):
        if found := _OF_A_GROUP.search(Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")):
            return found[1], found[2]
    for pid in processes.ancestors():
        if found := _OF_THE_DAEMON.match([*processes.words(pid), ""][0]):
            return found[1], found[2]
    return None
