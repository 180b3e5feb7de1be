"""Partitions of a cluster as sinfo reports them, and checks of a job against them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError
from pause_megatron.files.lines import lines_of
from pause_megatron.slurm.commands import output_of

_GPUS_OF_A_NODE = 8
_CPUS_OF_A_GPU = 8


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo reports it.

    Attributes:
        name: Name, without the mark of the default partition.
        default: Whether it is the default partition.
        gpus: Maximum GPUs of a node; 0 for none.
        nodes: Number of nodes.
        cpus: Minimum CPUs of a node.
        memory_mb: Minimum memory of a node, MB; 0 where slurm.conf has none.
        limit_seconds: Maximum time limit; None for no limit.
        default_seconds: Time limit of a job that asks for none; None for no limit.
    """

    name: str
    default: bool
    gpus: int
    nodes: int
    cpus: int
    memory_mb: int
    limit_seconds: int | None
    default_seconds: int | None


def partitions() -> dict[str, Partition]:
    """Return the partitions of this cluster by name.

    Raises:
        PauseMegatronError: sinfo fails.
    """
    return parse_partitions(output_of(["sinfo", "--noheader", "--format=%P|%G|%D|%l|%L|%c|%m"]))


def parse_partitions(text: str) -> dict[str, Partition]:
    """Parse sinfo's lines `NAME[*]|GRES|NODES|LIMIT|DEFAULT|CPUS|MB`, one for each kind of node of a partition.

    Args:
        text: Output of sinfo.
    """
    known: dict[str, Partition] = {}
    for line in text.splitlines():
        name, gres, nodes, limit, default, cpus, memory = line.strip().split("|")
        plain = name.rstrip("*")
        before = known.get(plain)
        counts = [int(count or 1) for count in re.findall(r"\bgpu(?::[^:,(]*[^:,(\d][^:,(]*)?(?::(\d+))?", gres)]
        known[plain] = Partition(
            plain,
            name.endswith("*"),
            max([*counts, before.gpus if before else 0], default=0),
            int(nodes) + (before.nodes if before else 0),
            min(int(cpus.rstrip("+")), before.cpus if before else sys.maxsize),  # "64+" is 64 and more
            min(_configured(memory), before.memory_mb if before else sys.maxsize),
            seconds_of(limit),
            seconds_of(limit if default == "n/a" else default),
        )
    return known


def _configured(memory: str) -> int:
    """Return MB of a node; 0 where slurm.conf has none and sinfo reports 1 MB."""
    size = int(memory.rstrip("+"))
    return 0 if size == 1 else size


def megabytes_of(text: str) -> int:
    """Return the MB of a size in SLURM's notation: a number of MB, or with the suffix K, M, G or T.

    Args:
        text: The size.

    Raises:
        ConfigError: The text is not a size.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise ConfigError(f"--mem: expected a size as sbatch takes it, for example 0 (all) or 200G, got {text!r}")
    return int(match[1]) * {"K": 1, "M": 1024, "": 1024, "G": 1024**2, "T": 1024**3}[match[2]] // 1024


@dataclass(frozen=True)
class Share:
    """CPUs and memory that a job asks of each node, besides GPUs.

    Attributes:
        cpus_per_task: CPUs of each rank; None for the site's default.
        mem: Memory as sbatch takes it; None for the site's default.
        exclusive: Whether no other job shares the node.
    """

    cpus_per_task: int | None
    mem: str | None
    exclusive: bool


def share_of_node(partition: Partition | None, *, tasks: int, gpus: int, exclusive: bool | None = None) -> Share:
    """Return the share of a node for a job: all of it for all GPUs, else in proportion to its GPUs.

    Args:
        partition: Partition; None where it is not known, which counts as nodes of 8 GPUs.
        tasks: Ranks per node.
        gpus: GPUs per node of the job; 0 for a run on CPUs, which takes the site's default.
        exclusive: Whether the job asks for exclusive nodes; None to ask for them where it takes all GPUs.
    """
    if not gpus:
        return Share(None, None, bool(exclusive))
    of_a_node = partition.gpus if partition and partition.gpus else _GPUS_OF_A_NODE
    if exclusive or (exclusive is None and gpus >= of_a_node):
        return Share(None, "0", True)
    if partition is None or not partition.gpus:
        return Share(_CPUS_OF_A_GPU, None, False)
    # A tenth is left for the system.
    memory = partition.memory_mb * gpus // partition.gpus * 9 // 10
    cpus = partition.cpus * gpus // partition.gpus // tasks
    return Share(max(1, cpus), f"{memory}M" if memory else None, False)


def seconds_of(text: str) -> int | None:
    """Return the seconds of a time in SLURM's notation: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:...].

    Args:
        text: The time.

    Returns:
        Seconds; None for no limit.

    Raises:
        ConfigError: The text is not a time.
    """
    if text.strip().lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ConfigError(
            f"--time: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, got {text!r}"
        )
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:  # hours come first after days
        parts += [0] * (3 - len(parts))
        return ((int(days) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def find_partition(known: dict[str, Partition], name: str | None) -> Partition:
    """Return the partition of a job.

    Args:
        known: Partitions by name.
        name: Name; None for the default partition.

    Raises:
        ConfigError: No partition has that name, or the cluster has no default.
    """
    partition = known.get(name) if name else next((entry for entry in known.values() if entry.default), None)
    if partition is None:
        got = f"got {name!r}{nearest(name, known)}" if name else "got none, and the cluster has no default"
        raise ConfigError(f"--partition: expected one of {', '.join(sorted(known)) or '(sinfo shows none)'}; {got}")
    return partition


@dataclass(frozen=True)
class Request:
    """Resources that a job asks of its partition.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: GPUs per node; 0 for a run on CPUs.
        cpus_per_node: CPUs per node; 0 for the site's default.
        memory_mb: Memory per node, MB; 0 for all of it or the site's default.
        seconds: Time limit; None for the partition's own.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_mb: int
    seconds: int | None


def check_partition(partition: Partition, request: Request) -> None:
    """Check that a partition has the resources of a job.

    Args:
        partition: The partition.
        request: What the job asks for.

    Raises:
        ConfigError: The partition has too few GPUs, CPUs, memory or nodes, or a shorter time limit.
    """
    gpus_per_node, cpus_per_node, memory_mb = request.gpus_per_node, request.cpus_per_node, request.memory_mb
    nodes, seconds = request.nodes, request.seconds
    if gpus_per_node and not partition.gpus:
        raise ConfigError(
            f"--partition {partition.name}: expected nodes with GPUs, got none from sinfo. Name another partition, "
            "or give --gpus-per-node 0 --tasks-per-node N for a run on CPUs"
        )
    if gpus_per_node > partition.gpus:
        raise ConfigError(
            f"--gpus-per-node: expected at most {partition.gpus} in partition {partition.name}, got {gpus_per_node}"
        )
    if cpus_per_node > partition.cpus:
        raise ConfigError(
            f"--cpus-per-task: expected at most {partition.cpus} CPUs for the ranks of a node in partition "
            f"{partition.name}, got {cpus_per_node}"
        )
    if partition.memory_mb and memory_mb > partition.memory_mb:
        raise ConfigError(
            f"--mem: expected at most {partition.memory_mb}M in partition {partition.name}, got {memory_mb}M; 0 is all"
        )
    if nodes > partition.nodes:
        raise ConfigError(f"--nodes: expected at most {partition.nodes} in partition {partition.name}, got {nodes}")
    if seconds and partition.limit_seconds and seconds > partition.limit_seconds:
        raise ConfigError(
            f"--time: expected at most {partition.limit_seconds} s in partition {partition.name}, got {seconds} s"
        )


def check_hostfile(path: Path, *, nodes: int, tasks_per_node: int) -> None:
    """Check that a DeepSpeed hostfile has the nodes and ranks of a job.

    Args:
        path: The hostfile.
        nodes: Number of nodes.
        tasks_per_node: Ranks per node.

    Raises:
        ConfigError: The file cannot be read, a line is wrong, or hosts or slots differ.
    """
    try:
        lines = lines_of(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"--hostfile {path}: {error.strerror}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (line := line.partition("#")[0].strip()):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if match is None or match[1] in slots:
            raise ConfigError(f"{path}:{number}: expected 'HOST slots=N', each host once, got {line!r}")
        slots[match[1]] = int(match[2])
    wrong = {host: count for host, count in slots.items() if count != tasks_per_node}
    if len(slots) != nodes or wrong:
        got = f"{len(slots)} hosts" + "".join(f", {host} with {count}" for host, count in list(wrong.items())[:3])
        raise ConfigError(
            f"--hostfile {path}: expected {nodes} hosts with {tasks_per_node} slots each, as the job has, got {got}"
        )
