"""Rank discovery: rank, world size and MASTER_ADDR, as torchrun, deepspeed or srun set them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pause_megatron.errors import ConfigError
from pause_megatron.host.job_step import own_variables

_LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAST_PORT = 65535

# Variables of each process manager: task number, number of tasks, and task number on its host.
_TASKS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class Ranks:
    """Rank, world size and rendezvous address of this process.

    Attributes:
        rank: Global rank, 0 .. world_size - 1.
        local_rank: Rank on this host, as the launcher counts.
        world_size: Number of ranks.
        master_addr: Host on which rank 0 listens.
        master_port: Port on which rank 0 listens; 0 for a single process.
        launcher: "torchrun", "deepspeed", "environment", "slurm" or "alone".
    """

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    launcher: str

    def environment(self) -> dict[str, str]:
        """Return the variables that torch and DeepSpeed read, so that neither detects another launcher."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover(environment: Mapping[str, str] | None = None, *, local_rank: int | None = None) -> Ranks:
    """Return the rank of this process and the launcher that started it.

    The variables of torchrun and deepspeed come first. Next is a SLURM job step (`srun`, or `deepspeed --launcher
    slurm`, which sets none itself). Otherwise it is a single process. A batch script that runs the program without
    `srun` is a single process, too: SLURM_PROCID and SLURM_NTASKS are set there, but only a job step has
    SLURM_STEP_NUM_TASKS. An empty variable counts as not set.

    Args:
        environment: Environment variables. Default: os.environ, without those that a job inherited from the step that
            submitted it.
        local_rank: Value of `--local_rank=N`, if the launcher passes it. Used where LOCAL_RANK is not set.

    Raises:
        ConfigError: A variable is missing, is not a valid number, or is another task's.
    """
    given = own_variables() if environment is None else environment
    env = {key: value for key, value in given.items() if value}
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_variables(env, local_rank)
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return _from_slurm(env)
    return Ranks(0, 0 if local_rank is None else local_rank, 1, "127.0.0.1", 0, "alone")


def discover_task(environment: Mapping[str, str] | None = None) -> Ranks:
    """Return the rank as `discover` does, or where RANK is invalid, the task number in the job step.

    With that rank the failure can be shared with the other ranks.

    Args:
        environment: Environment variables; default as in `discover`.

    Raises:
        ConfigError: As in `discover`, outside of a job step.
    """
    given = own_variables() if environment is None else environment
    try:
        return discover(given)
    except ConfigError:
        step = {key: value for key, value in given.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        ranks = discover(step)
        if ranks.launcher == "alone":
            raise
        return ranks


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: 'gpu[003-007,12],login1' -> 'gpu003'.

    Args:
        node_list: Value of SLURM_STEP_NODELIST.

    Raises:
        ConfigError: The list is empty, or its brackets do not match.
    """
    entry = re.match(r"((?:[^,\[\]]|\[[^\[\],-][^\[\]]*\])+)(?:,|$)", node_list.strip())
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry.group(1)) if entry else ""
    if not host:
        raise ConfigError(f"SLURM node list: expected a list such as 'node[01-04]', got {node_list!r}")
    return host


def _from_variables(env: Mapping[str, str], local_rank: int | None) -> Ranks:
    values = dict(env)
    if local_rank is not None:
        values.setdefault("LOCAL_RANK", str(local_rank))
    missing = [key for key in _LAUNCHER_KEYS if key not in values]
    if missing:
        raise ConfigError(
            f"environment: expected all of {', '.join(_LAUNCHER_KEYS)}, as torchrun and deepspeed set them, got "
            f"RANK and WORLD_SIZE without {', '.join(missing)}"
        )
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif local_rank is not None or "CROSS_RANK" in env:
        launcher = "deepspeed"
    else:
        launcher = "environment"
    world_size, tasks = _number(values, "WORLD_SIZE"), _number(env, "SLURM_STEP_NUM_TASKS", default=1)
    if world_size < tasks:
        raise ConfigError(
            f"environment: expected WORLD_SIZE of at least the {tasks} tasks of the SLURM job step, got {world_size}. "
            "If the shell that submitted the job had RANK and WORLD_SIZE set, unset them there: jobs inherit them"
        )
    rank, local = _number(values, "RANK"), _number(values, "LOCAL_RANK")
    if launcher == "environment":
        _compare_with_task(rank, world_size, local, env)
    return _checked(Ranks(rank, local, world_size, values["MASTER_ADDR"], _number(values, "MASTER_PORT"), launcher))


def _compare_with_task(rank: int, world_size: int, local: int, env: Mapping[str, str]) -> None:
    """Check that RANK is this task's number, where each task is a rank.

    `export RANK=$SLURM_PROCID` in a batch script is the script's own number, 0, which every task inherits. Where tasks
    are not ranks (torchrun, a loop that starts several, mpirun inside of a step), the counts differ, or one of several
    process managers has the right number.
    """
    managers = [names for names in _TASKS if all(env.get(name, "").isdecimal() for name in names[:2])]
    managers = [names for names in managers if int(env[names[1]]) == world_size > 1]
    if managers and all(int(env[name]) != rank for name, _, _ in managers):
        name, size, _ = managers[0]
        raise ConfigError(
            f"environment: expected RANK equal to {name}={env[name]} in a step of {env[size]} tasks ({size}), got "
            f"{rank}. RANK was exported before the tasks began, and each inherits it: unset RANK, WORLD_SIZE and "
            f"LOCAL_RANK there (srun needs none of them), or set them in the task: bash -c 'RANK=${name} ...'"
        )
    on_host = [(name, env[name]) for _, _, name in managers if env.get(name, "").isdecimal()]
    if (
        local and on_host and all(int(value) != local for _, value in on_host)
    ):  # 0 is right where the task sees only its own GPU
        name, value = on_host[0]
        raise ConfigError(
            f"environment: expected LOCAL_RANK equal to {name}={value}, or 0 where each task sees only its own GPU, "
            f"got {local}. Unset LOCAL_RANK, or set it in the task"
        )


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    world_size = _number(env, "SLURM_STEP_NUM_TASKS")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    address = env.get("MASTER_ADDR") or first_host(nodes)
    # Below Linux' ephemeral ports (32768 and up). Each step has a port of its own: steps of a job may run concurrently.
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID", default=0)
    port = _number(env, "MASTER_PORT", default=10000 + (job * 16 + step % 16) % 20000)
    return _checked(
        Ranks(_number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID"), world_size, address, port, "slurm")
    )


def _checked(ranks: Ranks) -> Ranks:
    if not 0 <= ranks.rank < ranks.world_size or ranks.local_rank < 0:
        raise ConfigError(
            f"{ranks.launcher}: expected 0 <= rank < world size and local rank >= 0, got rank {ranks.rank}, "
            f"world size {ranks.world_size}, local rank {ranks.local_rank}"
        )
    # A single process may listen on any free port.
    if not (ranks.world_size == 1 and ranks.master_port == 0) and not 1 <= ranks.master_port <= _LAST_PORT:
        raise ConfigError(
            f"environment variable MASTER_PORT: expected a port, 1 to {_LAST_PORT}, got {ranks.master_port}"
        )
    return ranks


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.strip().isdecimal()):
        raise ConfigError(f"environment variable {key}: expected a whole number, got {text!r}")
    return int(text)
