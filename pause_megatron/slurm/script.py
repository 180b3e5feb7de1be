"""Job scripts from one template: `launch`, the files in launchers/ and the cells of an experiment."""

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
    """A run as a SLURM job.

    Attributes:
        verb: pretrain or finetune
        arguments: of the verb; None: those that sbatch is given behind the script
        nodes, tasks_per_node: ranks
        gpus_per_node: 0: none are asked for
        cpus_per_task: CPUs of each rank; None: the node's, where the job is alone on it, else the site's default
        mem: memory of a node as sbatch takes it, "0" for all of it; None: the site's default
        exclusive: whether nobody else is on the nodes
        launcher: one of `LAUNCHERS`
        name: of the job; default: the verb
        partition, time: as sbatch takes them; None: the site's default
        container: "pyxis:IMAGE" or "apptainer:IMAGE"; None: none
        signal_seconds: before the time limit at which SLURM sends SIGUSR2
        lines: further `#SBATCH` lines, without that word
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
    """The job script of a run.

    Args:
        template: a site's own, with the same marks

    Raises:
        ConfigError: an unknown launcher or container, a template that lacks a mark, or text that cannot be written so
            that it is read as it is.
    """
    if job.launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher: expected one of {', '.join(LAUNCHERS)}, came {job.launcher!r}")
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
        # A job that SLURM is ending has had its signal, and scancel would insist for as long as KillWait.
        FORWARD='running && scancel --signal=USR2 "$SLURM_JOB_ID"',
    )


def render_experiment(template: Path = TEMPLATE) -> str:
    """The job script of a whole experiment on one node, which takes the words of `pause-megatron experiment run`."""
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
    """What every job of ours says: append to its output, be requeued, be told before the time limit."""
    return ["--open-mode=append", "--requeue", f"--signal=B:USR2@{signal_seconds}"]


def directive_lines(directives: Sequence[str]) -> str:
    """`#SBATCH` lines."""
    return "\n".join(f"#SBATCH {line}" for line in directives)


def fill(template: Path, **values: str) -> str:
    """The template with each @MARK@ replaced.

    Raises:
        ConfigError: it cannot be read, or lacks one of the marks.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{template}: expected a template of a job script: {error.strerror}") from None
    missing = [f"@{mark}@" for mark in _MARKS if f"@{mark}@" not in text]
    if missing:
        raise ConfigError(f"{template}: expected the marks of {TEMPLATE.name}, {', '.join(missing)} not there")
    # In one pass: what takes the place of a mark may look like one.
    return re.sub(r"@([A-Z]+)@", lambda mark: values.get(mark[1], mark[0]), text)


_SITE = """
# The site's own: how the software gets here, and its network. The rest of the script needs no change.
# module load cuda
# source .venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5"""

_SETUP = (
    _SITE
    + """

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-@THREADS@} PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
# Should SLURM's signal be lost, the run stops in time by itself.
export SLURM_JOB_END_TIME=$(date --date="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%e)" +%s 2>/dev/null)
logs=logs/${SLURM_JOB_NAME//[^A-Za-z0-9._-]/_}-$SLURM_JOB_ID # a file for each rank
mkdir -p "$logs"
echo "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, logs in $PWD/$logs\""""
)

# Containers take a folder to mount as SOURCE:TARGET, and several with commas between.
_MOUNTED = """
case $PWD in *[:,]*) echo "$PWD: a folder with a colon or comma cannot be mounted in a container" >&2; exit 2 ;; esac"""


CPUS_OF_A_TASK = """
# Since SLURM 22.05 srun does not take the CPUs of a task from the job by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"""


def _setup(job: TrainingJob) -> str:
    # On CPUs a rank computes with all of its own.
    setup = _SETUP.replace("@THREADS@", "1" if job.gpus_per_node else "${SLURM_CPUS_PER_TASK:-1}")
    setup += "" if job.container is None else _MOUNTED
    return setup if job.launcher == "torchrun" else setup + CPUS_OF_A_TASK  # torchrun's one task has the whole node


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
    """Options of srun, and what stands before the program, for a container."""
    if job.container is None:
        return "", ""
    kind, _, image = printable(job.container, "--container").partition(":")
    if image.startswith("-"):
        raise ConfigError(f"--container: expected an image, got {image!r}, which reads like an option")
    if kind == "pyxis" and image:
        mounts = '--container-mounts="$PWD" --container-workdir="$PWD"'
        return f" \\\n    --container-image={shlex.quote(image)} {mounts}", ""
    if kind == "apptainer" and image:
        nv = " --nv" if job.gpus_per_node else ""
        return "", f'apptainer exec{nv} --bind "$PWD" {shlex.quote(image)} '
    raise ConfigError(f"--container: expected pyxis:IMAGE or apptainer:IMAGE, came {job.container!r}")


def _srun(job: TrainingJob) -> str:
    """A task for each rank."""
    options, before = _contained(job)
    return (
        f'srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/rank-%4t.txt"{options} \\\n'
        f"    {before}python -m pause_megatron {job.verb} {_arguments(job)}"
    )


def _torchrun(job: TrainingJob) -> str:
    """A task for each node. SIGUSR2 would end torchrun and its ranks: the ranks alone handle what it ignores."""
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
    """DeepSpeed's own launcher over srun. It runs a file, not a module: the package's folder is one."""
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
