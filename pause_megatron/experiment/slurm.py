"""Hands the cells of a grid to SLURM: a job per cell, each after the job of the cell that it begins from. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.durable import write_whole
from pause_megatron.errors import ConfigError, PauseMegatronError
from pause_megatron.experiment.cell import VERSION, read_json, write_json
from pause_megatron.experiment.folder import TRAINING, Placed

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

TEMPLATE = Path(__file__).resolve().parent / "job.sbatch"


@dataclass(frozen=True)
class JobOptions:
    """What a site wants of its jobs.

    Attributes:
        partition, time: as sbatch takes them; None: the site's default.
        nodes: of a training cell; its ranks are spread evenly.
        gpus: of each task; None: none asked for.
        lines: further `#SBATCH` lines, without that word.
    """

    partition: str | None = None
    time: str | None = None
    nodes: int = 1
    gpus: int | None = None
    lines: tuple[str, ...] = ()


def submit(directory: Path, placed: Mapping[str, Placed], options: JobOptions, say: Callable[[str], None]) -> int:
    """Submit a job for every cell that is neither done nor in the queue already.

    Args:
        directory: of the experiment. placed: by fingerprint, inputs first.

    Returns:
        0.

    Raises:
        ConfigError: no sbatch here, or ranks that do not spread over the nodes. PauseMegatronError: SLURM refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm: expected sbatch on PATH; leave --slurm out to run the cells on this machine")
    queue = queued_jobs()
    jobs: dict[str, str] = {}
    submitted = kept = done = 0
    for fingerprint, entry in placed.items():
        if entry.done:
            done += 1
            continue
        job = job_in_queue(entry.folder, queue)
        if job is None:
            before = jobs.get(entry.cell.input.fingerprint) if entry.cell.input else None
            job = _submit_one(entry, options, before)
            submitted += 1
            say(f"job {job}{f' after {before}' if before else ''}: {entry.cell.name}")
        else:
            kept += 1
        jobs[fingerprint] = job
    say(f"{submitted} jobs submitted, {kept} in the queue before, {done} cells done; look with: squeue --me")
    say(f"or: pause-megatron experiment status {directory}")
    return 0


def queued_jobs() -> dict[str, str]:
    """Number and name of every job of this user that has not ended; empty where there is no SLURM.

    Raises:
        PauseMegatronError: squeue fails.
    """
    if shutil.which("squeue") is None:
        return {}
    # All states: between its run and the queue a requeued job is in none of those that squeue shows by itself.
    lines = _slurm(["squeue", "--noheader", "--me", "--states=all", "--format=%i %T %j"]).splitlines()
    jobs = (line.split(maxsplit=2) for line in lines if line.strip())
    return {number: name for number, state, name in jobs if state not in ENDED}


def job_in_queue(folder: Path, queue: Mapping[str, str]) -> str | None:
    """The number of a cell's job if it has not ended. (Numbers are given anew one day: the name is compared too.)"""
    record = read_json(folder / "job.json", missing_ok=True)
    return record["job"] if record and queue.get(record["job"], "").strip() == folder.name else None


def render(folder: Path, verb: str, ranks: int, options: JobOptions) -> str:
    """The job script of a cell.

    Args:
        folder: of the cell. ranks: of the verb.

    Raises:
        ConfigError: the ranks do not spread over the nodes.
    """
    nodes = options.nodes if verb in TRAINING else 1
    if ranks % nodes:
        raise ConfigError(f"--nodes: expected a divisor of --ranks ({ranks}), came {nodes}")
    lines = {"partition": options.partition, "time": options.time, "gpus-per-task": options.gpus}
    extra = [f"--{name}={value}" for name, value in lines.items() if value is not None]
    values = {
        "NAME": folder.name,
        "FOLDER": shlex.quote(str(folder)),
        "NODES": str(nodes),
        "TASKS_PER_NODE": str(ranks // nodes),
        "OPTIONS": "".join(f"#SBATCH {line}\n" for line in (*extra, *options.lines)),
        "DIRECTORY": shlex.quote(os.getcwd()),
        "PYTHON": shlex.quote(sys.executable),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _submit_one(entry: Placed, options: JobOptions, before: str | None) -> str:
    """Write job.sbatch, submit it, and remember its number."""
    record = read_json(entry.folder / "cell.json")
    script = entry.folder / "job.sbatch"
    write_whole(script, render(entry.folder, record["verb"], record["ranks"], options).encode())
    dependency = [f"--dependency=afterok:{before}"] if before else []
    job = _slurm(["sbatch", "--parsable", *dependency, str(script)]).strip().partition(";")[0]
    write_json(entry.folder / "job.json", {"version": VERSION, "job": job})
    return job


def _slurm(command: Sequence[str]) -> str:
    """What a command of SLURM prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PauseMegatronError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
