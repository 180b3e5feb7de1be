"""SLURM's own commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from pause_megatron.errors import PauseMegatronError
from pause_megatron.host import launcher

# A job in one of these states will not run any more.
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
}


def installed() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None


def output_of(command: Sequence[str], text: str | None = None) -> str:
    """What a command of SLURM prints.

    Args:
        text: for its standard input

    Raises:
        PauseMegatronError: it is not there, or it fails; its own words.
    """
    try:
        # A job inherits variables, and is not to end with the process that submits it.
        environment = {name: value for name, value in os.environ.items() if name != launcher.VARIABLE}
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    except OSError as error:
        absent = shutil.which(command[0]) is None
        reason = "not found on PATH, SLURM is not installed here" if absent else error.strerror
        raise PauseMegatronError(f"{command[0]}: {reason}") from None
    if done.returncode:
        words = done.stderr.strip().removeprefix(f"{command[0]}: ") or f"exit code {done.returncode}"
        raise PauseMegatronError(f"{command[0]}: {words}")
    return done.stdout


def submit_script(script: str, *options: str) -> str:
    """Submit a job script; its number."""
    return output_of(["sbatch", "--parsable", *options], script).strip().partition(";")[0]


def queued_jobs() -> dict[str, str]:
    """Number and name of every job of this user that has not ended; empty where there is no SLURM.

    Raises:
        PauseMegatronError: squeue fails.
    """
    if shutil.which("squeue") is None:
        return {}
    # All states: between its run and the queue a requeued job is in none of those that squeue shows by itself.
    lines = output_of(["squeue", "--noheader", "--me", "--states=all", "--format=%i %T %j"]).splitlines()
    jobs = (line.split(maxsplit=2) for line in lines if line.strip())
    return {number: name for number, state, name in jobs if state not in ENDED}
