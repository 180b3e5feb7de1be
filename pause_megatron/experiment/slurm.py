"""Hands the cells of a grid to SLURM: a job per cell, each after the job of the cell that it begins from. No torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.errors import ConfigError
from pause_megatron.experiment.cell import VERSION, read_json, write_json
from pause_megatron.experiment.folder import TRAINING, Placed
from pause_megatron.files.durable import write_whole
from pause_megatron.slurm.commands import installed, output_of, queued_jobs
from pause_megatron.slurm.quoting import directive, further_line, job_name, printable
from pause_megatron.slurm.script import (
    CPUS_OF_A_TASK,
    SIGNAL_SECONDS,
    TEMPLATE,
    common_directives,
    directive_lines,
    fill,
)


@dataclass(frozen=True)
class JobOptions:
    """What a site wants of its jobs.

    Attributes:
        partition, time: as sbatch takes them; None: the site's default.
        nodes: of a training cell; its ranks are spread evenly.
        gpus, cpus: of each task; None: none asked for, and the site's default.
        lines: further `#SBATCH` lines, without that word.
    """

    partition: str | None = None
    time: str | None = None
    nodes: int = 1
    gpus: int | None = None
    cpus: int | None = None
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
    if not installed():
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
    say(f"or: pause-megatron experiment status {shlex.quote(str(directory))}")
    return 0


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
    nodes, output = options.nodes if verb in TRAINING else 1, str(folder / "job.txt")
    if "\\" in output:
        raise ConfigError(f"DIRECTORY: expected a path without backslashes, which SLURM erases, got {output}")
    if ranks % nodes:
        raise ConfigError(f"--nodes: expected a divisor of --ranks ({ranks}), got {nodes}")
    wanted = {"partition": options.partition, "time": options.time}
    wanted |= {"gpus-per-task": options.gpus, "cpus-per-task": options.cpus}
    directives = [
        directive("job-name", job_name(folder.name, "cell")),
        directive("output", output.replace("%", "%%"), "DIRECTORY"),
        f"--nodes={nodes}",
        f"--ntasks-per-node={ranks // nodes}",
        *common_directives(SIGNAL_SECONDS),
        "--kill-on-invalid-dep=yes",
        *(directive(name, value) for name, value in wanted.items() if value is not None),
        *map(further_line, options.lines),
    ]
    return fill(
        TEMPLATE,
        ABOUT="One cell of an experiment, as `pause-megatron experiment run --slurm` submits it.",
        DIRECTIVES=directive_lines(directives),
        SETUP=f"cd {shlex.quote(printable(os.getcwd(), 'the folder that this runs in'))}{CPUS_OF_A_TASK}",
        PROGRAM=f"{shlex.quote(sys.executable)} -m pause_megatron experiment cell {shlex.quote(str(folder))}",
        FORWARD="kill -USR2 $program",
    )


def _submit_one(entry: Placed, options: JobOptions, before: str | None) -> str:
    """Write job.sbatch, submit it, and remember its number."""
    record = read_json(entry.folder / "cell.json")
    script = entry.folder / "job.sbatch"
    write_whole(script, render(entry.folder, record["verb"], record["ranks"], options).encode())
    dependency = [f"--dependency=afterok:{before}"] if before else []
    job = output_of(["sbatch", "--parsable", *dependency, str(script)]).strip().partition(";")[0]
    write_json(entry.folder / "job.json", {"version": VERSION, "job": job})
    return job
