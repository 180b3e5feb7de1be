"""Job scripts from one template, for `launch`, the files in launchers/ and the cells of an experiment."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.errors import ConfigError
from pause_megatron.slurm.quoting import directive, further_line, job_name, printable

TEMPLATE = Path(__file__).resolve().parent / "job.sbatch"
SIGNAL_SECONDS = 300
_MARKS = ("ABOUT", "DIRECTIVES", "SETUP", "PROGRAM", "FORWARD")


@dataclass(frozen=True)
class TrainingJob:
    """A training run as a SLURM job.

    Attributes:
        verb: "pretrain" or "finetune".
        arguments: Arguments of the verb; None for those that sbatch is given after the script.
        nodes: Number of nodes.
        tasks_per_node: Ranks per node.
        gpus_per_node: GPUs per node; 0 for a run on CPUs.
        cpus_per_task: CPUs of each rank; None for all of an exclusive node, else for the site's default.
        mem: Memory of a node as sbatch takes it, "0" for all of it; None for the site's default.
        exclusive: Whether no other job shares the nodes.
        launcher: One of `LAUNCHERS`.
        name: Name of the job; None for the verb.
        partition: Partition; None for the site's default.
        time: Time limit as sbatch takes it; None for the site's default.
        container: "pyxis:IMAGE" or "apptainer:IMAGE"; None for none.
        signal_seconds: Seconds before the time limit at which SLURM sends SIGUSR2.
        lines: Further `#SBATCH` lines, without that word.
    """

    verb: str
    arguments: tuple[str, ...] | None = None
    nodes: int = 1
    tasks_per_node: int = 8
    gpus_per_node: int = 8
    cpus_per_task: int | None = None
    mem: str | None = "0"
    exclusive: bool = True
    launcher: str = "srun"
    name: str | None = None
    partition: str | None = None
    time: str | None = None
    container: str | None = None
    signal_seconds: int = SIGNAL_SECONDS
    lines: tuple[str, ...] = ()


def render_training(job: TrainingJob, template: Path = TEMPLATE) -> str:
    """Return the job script of a training run.

    Args:
        job: The job.
        template: Template file; a site's own has the same marks.

    Raises:
        ConfigError: The launcher or container is unknown, the template lacks a mark, or a text cannot be quoted.
    """
    if job.launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher: expected one of {', '.join(LAUNCHERS)}, got {job.launcher!r}")
    directives = [
        directive("job-name", job_name(job.name or job.verb)),
        *([directive("partition", job.partition)] if job.partition else []),
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []),
        *([directive("mem", job.mem)] if job.mem else []),
        *(["--exclusive"] if job.exclusive else []),
        *([directive("time", job.time)] if job.time else []),
        "--output=%x-%j.txt",
        *common_directives(job.signal_seconds),
        *map(further_line, job.lines),
    ]
    return fill(
        template,
        ABOUT=_about(job),
        DIRECTIVES=directive_lines(directives),
        SETUP=_setup(job),
        PROGRAM=LAUNCHERS[job.launcher](job),
        # A job that SLURM is ending has had its signal; scancel would retry for as long as KillWait.
        FORWARD='running && scancel --signal=USR2 "$SLURM_JOB_ID"',
    )


def render_experiment(template: Path = TEMPLATE) -> str:
    """Return the job script of a whole experiment on one node; it takes the arguments of `experiment run`.

    Args:
        template: Template file.
    """
    example = "--recipe tiny data.prefix=english --jobs 4"
    return fill(
        template,
        ABOUT=f"A grid of runs as one SLURM job of one node: sbatch launchers/experiment.sbatch {example}",
        DIRECTIVES=directive_lines(
            [
                *("--job-name=experiment", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=8"),
                *("--mem=0", "--exclusive"),
                *("--output=%x-%j.txt", *common_directives(SIGNAL_SECONDS)),
            ]
        ),
        SETUP=_SITE,
        PROGRAM='python -m pause_megatron experiment run "$@"',
        FORWARD="kill -USR2 $program",
    )


def common_directives(signal_seconds: int) -> list[str]:
    """Return the directives of every job: append to its output, requeue, and a signal before the time limit.

    Args:
        signal_seconds: Seconds before the time limit at which SLURM sends SIGUSR2.
    """
    return ["--open-mode=append", "--requeue", f"--signal=B:USR2@{signal_seconds}"]


def directive_lines(directives: Sequence[str]) -> str:
    """Return directives as `#SBATCH` lines.

    Args:
        directives: Options of sbatch.
    """
    return "\n".join(f"#SBATCH {line}" for line in directives)


def fill(template: Path, **values: str) -> str:
    """Return a template's text with each @MARK@ replaced.

    Args:
        template: Template file.
        **values: Text of each mark.

    Raises:
        ConfigError: The template cannot be read, or lacks a mark.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{template}: expected a template of a job script: {error.strerror}") from None
    missing = [f"@{mark}@" for mark in _MARKS if f"@{mark}@" not in text]
    if missing:
        raise ConfigError(f"{template}: expected the marks of {TEMPLATE.name}, got none of {', '.join(missing)}")
    # In one pass, because a value may look like a mark.
    return re.sub(r"@([A-Z]+)@", lambda mark: values.get(mark[1], mark[0]), text)


_SITE = """
# Site settings: software environment and network. The rest of the script needs no change.
# module load cuda
# source .venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5"""

_SETUP = (
    _SITE
    + """

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-@THREADS@} PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
# The run stops in time by itself if SLURM's signal is lost.
export SLURM_JOB_END_TIME=$(date --date="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%e)" +%s 2>/dev/null)
logs=logs/${SLURM_JOB_NAME//[^A-Za-z0-9._-]/_}-$SLURM_JOB_ID # a file for each rank
mkdir -p "$logs"
echo "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, logs in $PWD/$logs\""""
)

# Containers take mounts as SOURCE:TARGET, several separated by commas.
_MOUNTED = """
case $PWD in *[:,]*) echo "$PWD: a folder with a colon or comma cannot be mounted in a container" >&2; exit 2 ;; esac"""


CPUS_OF_A_TASK = """
# Since SLURM 22.05 srun does not inherit the CPUs of a task from the job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"""


def _setup(job: TrainingJob) -> str:
    # On CPUs a rank uses all of its cores.
    setup = _SETUP.replace("@THREADS@", "1" if job.gpus_per_node else "${SLURM_CPUS_PER_TASK:-1}")
    setup += "" if job.container is None else _MOUNTED
    return setup if job.launcher == "torchrun" else setup + CPUS_OF_A_TASK  # torchrun has one task with the whole node


def _about(job: TrainingJob) -> str:
    what = {"pretrain": "Pause-pretraining", "finetune": "Pause-finetuning"}[job.verb]
    if job.arguments is not None:
        return f"{what} as a SLURM job."
    example = {"pretrain": "c4-1b-pause data.prefix=c4/en", "finetune": "finetune-gsm8k model.from=runs/c4-1b-pause"}
    return f"{what} as a SLURM job: sbatch launchers/{job.verb}.sbatch --recipe {example[job.verb]}"


def _arguments(job: TrainingJob) -> str:
    if job.arguments is None:
        return '"$@"'
    return shlex.join(printable(word, f"argument {word.partition('=')[0]!r}") for word in job.arguments)


def _contained(job: TrainingJob) -> tuple[str, str]:
    """Return srun's options for a container, and the command to prepend to the program."""
    if job.container is None:
        return "", ""
    kind, _, image = printable(job.container, "--container").partition(":")
    if image.startswith("-"):
        raise ConfigError(f"--container: expected an image, got {image!r}, which looks like an option")
    if kind == "pyxis" and image:
        mounts = '--container-mounts="$PWD" --container-workdir="$PWD"'
        return f" \\\n    --container-image={shlex.quote(image)} {mounts}", ""
    if kind == "apptainer" and image:
        nv = " --nv" if job.gpus_per_node else ""
        return "", f'apptainer exec{nv} --bind "$PWD" {shlex.quote(image)} '
    raise ConfigError(f"--container: expected pyxis:IMAGE or apptainer:IMAGE, got {job.container!r}")


def _srun(job: TrainingJob) -> str:
    """Return the command that starts one task per rank."""
    options, before = _contained(job)
    return (
        f'srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/rank-%4t.txt"{options} \\\n'
        f"    {before}python -m pause_megatron {job.verb} {_arguments(job)}"
    )


def _torchrun(job: TrainingJob) -> str:
    """Return the command that starts torchrun once per node; it ignores SIGUSR2, which its ranks handle."""
    options, before = _contained(job)
    inner = (
        f'trap "" USR2; exec {before}python -m pause_megatron.distributed.torchrun --nnodes=$SLURM_JOB_NUM_NODES '
        f"--node-rank=$SLURM_NODEID --nproc-per-node={job.tasks_per_node} --master-addr=$MASTER_ADDR "
        f'--master-port=$MASTER_PORT -m pause_megatron {job.verb} "$@"'
    )
    return (
        "srun --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --kill-on-bad-exit=1 --open-mode=append \\\n"
        f'    --output="$logs/node-%4n.txt"{options} \\\n'
        f"    bash -c {shlex.quote(inner)} \\\n    torchrun {_arguments(job)}"
    )


def _deepspeed(job: TrainingJob) -> str:
    """Return the command of DeepSpeed's launcher over srun; it runs a file or folder, here the package's folder."""
    if job.container is not None:
        raise ConfigError(
            "--container: not with --launcher deepspeed, which starts python itself; use srun or torchrun"
        )
    srun = f"--ntasks-per-node={job.tasks_per_node} --kill-on-bad-exit=1 --open-mode=append --output=$logs/rank-%4t.txt"
    return (
        f'scontrol show hostnames | sed "s/$/ slots={job.tasks_per_node}/" >"$logs/hostfile"\n'
        'package=$(python -c "import pause_megatron; print(pause_megatron.__path__[0])")\n'
        'deepspeed --hostfile "$logs/hostfile" --launcher slurm --no_ssh_check --master_addr "$MASTER_ADDR" \\\n'
        f'    --launcher_args="{srun}" \\\n'
        f'    "$package" {job.verb} {_arguments(job)}'
    )


LAUNCHERS: dict[str, Callable[[TrainingJob], str]] = {"srun": _srun, "torchrun": _torchrun, "deepspeed": _deepspeed}
