"""Calls of sbatch, squeue, sinfo and other SLURM commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from pause_megatron.errors import PauseMegatronError
from pause_megatron.host.launcher_search import VARIABLE

# Final states of a job.
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
    """Return whether sbatch is on PATH."""
    return shutil.which("sbatch") is not None


def output_of(command: Sequence[str], text: str | None = None) -> str:
    """Run a SLURM command and return its standard output.

    Args:
        command: The command and its arguments.
        text: Its standard input; None for none.

    Raises:
        PauseMegatronError: The command is not installed, or it fails; with its own message.
    """
    try:
        # A job inherits variables; with this one it would end together with the process that submits it.
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
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
    """Submit a job script and return its job id.

    Args:
        script: Text of the script.
        *options: Further options of sbatch.

    Raises:
        PauseMegatronError: sbatch refuses it.
    """
    return output_of(["sbatch", "--parsable", *options], script).strip().partition(";")[0]


def queued_jobs() -> dict[str, str]:
    """Return id and name of each job of this user that has not ended; none without SLURM.

    Raises:
        PauseMegatronError: squeue fails.
    """
    if shutil.which("squeue") is None:
        return {}
    # All states: while it is requeued, a job is in none of those that squeue shows by default.
    lines = output_of(["squeue", "--noheader", "--me", "--states=all", "--format=%i %T %j"]).splitlines()
    jobs = (line.split(maxsplit=2) for line in lines if line.strip())
    return {job_id: name for job_id, state, name in jobs if state not in ENDED}
