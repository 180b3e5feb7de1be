"""Submission of the cells of a grid to SLURM: a job per cell, each after the jobs of its input cells."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.errors import ConfigError
from pause_megatron.experiment.folder import TRAINING, LocatedCell
from pause_megatron.experiment.stored import CellFile, JobFile
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobOptions:
    """Options of the jobs.

    Attributes:
        partition: As sbatch takes it; None for the site's default.
        time: Time limit, as sbatch takes it; None for the site's default.
        nodes: Nodes of a training cell; its ranks are divided evenly.
        gpus: GPUs of each task; None requests none.
        cpus: CPUs of each task; None for the site's default.
        lines: Further `#SBATCH` lines, without that word.
    """

    partition: str | None = None
    time: str | None = None
    nodes: int = 1
    gpus: int | None = None
    cpus: int | None = None
    lines: tuple[str, ...] = ()


def submit(directory: Path, located: Mapping[str, LocatedCell], options: JobOptions) -> int:
    """Submit a job for every cell that is neither complete nor in the queue.

    Args:
        directory: Folder of the experiment.
        located: The cells by fingerprint, inputs first.
        options: Options of the jobs.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: sbatch is missing, or the ranks do not divide among the nodes.
        PauseMegatronError: SLURM rejects a job.
    """
    if not installed():
        raise ConfigError("--slurm: expected sbatch on PATH, got none; without --slurm the cells run on this machine")
    queue = queued_jobs()
    jobs: dict[str, str] = {}
    submitted = kept = done = 0
    for fingerprint, entry in located.items():
        if entry.done:
            done += 1
            continue
        job = job_in_queue(entry.folder, queue)
        if job is None:
            dependency = ":".join(jobs[each.fingerprint] for each in entry.cell.inputs if each.fingerprint in jobs)
            job = _submit_one(entry, options, dependency)
            submitted += 1
            log.info(f"job {job}{f' after {dependency}' if dependency else ''}: {entry.cell.name}")
        else:
            kept += 1
        jobs[fingerprint] = job
    log.info(f"{submitted} jobs submitted, {kept} already queued, {done} cells done; monitor with: squeue --me")
    log.info(f"or: pause-megatron experiment status {shlex.quote(str(directory))}")
    return 0


def job_in_queue(folder: Path, queue: Mapping[str, str]) -> str | None:
    """Return the id of a cell's job if it has not ended. SLURM reuses ids, so the job's name is compared too.

    Args:
        folder: Folder of the cell.
        queue: Job names by id, see `queued_jobs`.
    """
    submitted = JobFile.read_if_present(folder)
    return submitted.job if submitted and queue.get(submitted.job, "").strip() == folder.name else None


def render(folder: Path, verb: str, ranks: int, options: JobOptions) -> str:
    """Return the job script of a cell.

    Args:
        folder: Folder of the cell.
        verb: The verb.
        ranks: Ranks of the verb.
        options: Options of the job.

    Raises:
        ConfigError: The ranks do not divide among the nodes, or the path holds a backslash.
    """
    nodes, output = options.nodes if verb in TRAINING else 1, str(folder / "job.txt")
    if "\\" in output:
        raise ConfigError(f"DIRECTORY: expected a path without backslashes, which SLURM erases, got {output}")
    if ranks % nodes:
        raise ConfigError(f"--nodes: expected a divisor of --ranks ({ranks}), got {nodes}")
    wanted: dict[str, str | int | None] = {"partition": options.partition, "time": options.time}
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


def _submit_one(entry: LocatedCell, options: JobOptions, dependency: str) -> str:
    """Write job.sbatch, submit it after the jobs `dependency` ("3:4"; "" for none), write job.json, return the id."""
    cell = CellFile.read(entry.folder)
    script = entry.folder / "job.sbatch"
    write_whole(script, render(entry.folder, cell.verb, cell.ranks, options).encode())
    options_of_job = [f"--dependency=afterok:{dependency}"] if dependency else []
    job = output_of(["sbatch", "--parsable", *options_of_job, str(script)]).strip().partition(";")[0]
    JobFile(job=job).write(entry.folder)
    return job
