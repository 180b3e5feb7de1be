"""What a cluster says about itself, and what a job asks of it that it does not have."""

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
    """A partition as sinfo shows it.

    Attributes:
        name: without the mark of the default one
        default: whether jobs go there that name none
        gpus: most of a node; 0: none
        nodes: of the partition
        cpus: of a node, the least of all
        memory_mb: of a node, the least of all; 0: the site does not say
        limit_seconds: longest job; None: no limit
        default_seconds: of a job that names no limit; None: no limit
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
    """The partitions of this cluster, by name.

    Raises:
        PauseMegatronError: sinfo fails.
    """
    return parse_partitions(output_of(["sinfo", "--noheader", "--format=%P|%G|%D|%l|%L|%c|%m"]))


def parse_partitions(text: str) -> dict[str, Partition]:
    """From lines of `NAME[*]|GRES|NODES|LIMIT|DEFAULT|CPUS|MB`; a partition has a line for each kind of node."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, gres, nodes, limit, default, cpus, memory = line.strip().split("|")
        plain = name.rstrip("*")
        before = found.get(plain)
        counts = [int(count or 1) for count in re.findall(r"\bgpu(?::[^:,(]*[^:,(\d][^:,(]*)?(?::(\d+))?", gres)]
        found[plain] = Partition(
            plain,
            name.endswith("*"),
            max([*counts, before.gpus if before else 0], default=0),
            int(nodes) + (before.nodes if before else 0),
            min(int(cpus.rstrip("+")), before.cpus if before else sys.maxsize),  # "64+": and more
            min(_said(memory), before.memory_mb if before else sys.maxsize),
            seconds_of(limit),
            seconds_of(limit if default == "n/a" else default),
        )
    return found


def _said(memory: str) -> int:
    """MB; 0 for the 1 MB of a node of which slurm.conf says nothing."""
    size = int(memory.rstrip("+"))
    return 0 if size == 1 else size


def megabytes_of(text: str) -> int:
    """MB of a size as SLURM writes it: a number of MB, or of K, M, G, T.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise ConfigError(f"--mem: expected a size as sbatch takes it, for example 0 (all) or 200G, got {text!r}")
    return int(match[1]) * {"K": 1, "M": 1024, "": 1024, "G": 1024**2, "T": 1024**3}[match[2]] // 1024


@dataclass(frozen=True)
class Share:
    """What a job asks of each node beside GPUs, as in `TrainingJob`."""

    cpus_per_task: int | None
    mem: str | None
    exclusive: bool


def share_of_node(partition: Partition | None, *, tasks: int, gpus: int, exclusive: bool | None = None) -> Share:
    """A whole node for a job that takes all its GPUs; else what belongs to its GPUs; on CPUs the site's default.

    Args:
        partition: None: not known; then a node is taken to have 8 GPUs.
        tasks: ranks of a node.
        gpus: of a node that the job takes; 0: it runs on CPUs.
        exclusive: whether it wants the node for itself; None: where it takes all GPUs.
    """
    if not gpus:
        return Share(None, None, bool(exclusive))
    of_a_node = partition.gpus if partition and partition.gpus else _GPUS_OF_A_NODE
    if exclusive or (exclusive is None and gpus >= of_a_node):
        return Share(None, "0", True)
    if partition is None or not partition.gpus:
        return Share(_CPUS_OF_A_GPU, None, False)
    # Some of it belongs to the system.
    memory = partition.memory_mb * gpus // partition.gpus * 9 // 10
    cpus = partition.cpus * gpus // partition.gpus // tasks
    return Share(max(1, cpus), f"{memory}M" if memory else None, False)


def seconds_of(text: str) -> int | None:
    """Seconds of a time as SLURM writes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or these behind DAYS-.

    Returns:
        None: no limit.

    Raises:
        ConfigError: it is no time.
    """
    if text.strip().lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ConfigError(
            f"--time: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, came {text!r}"
        )
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:  # the days are followed by hours
        parts += [0] * (3 - len(parts))
        return ((int(days) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def find_partition(known: dict[str, Partition], name: str | None) -> Partition:
    """The partition of a job.

    Args:
        known: see `partitions`
        name: None: the default one

    Raises:
        ConfigError: no such partition, or no default.
    """
    partition = known.get(name) if name else next((entry for entry in known.values() if entry.default), None)
    if partition is None:
        came = f"came {name!r}{nearest(name, known)}" if name else "came none, and the cluster has no default"
        raise ConfigError(f"--partition: expected one of {', '.join(sorted(known)) or '(sinfo shows none)'}; {came}")
    return partition


def check_partition(
    known: dict[str, Partition],
    name: str | None,
    *,
    nodes: int,
    gpus_per_node: int,
    cpus_per_node: int,
    memory_mb: int,
    seconds: int | None,
) -> None:
    """Refuse what the partition does not have.

    Args:
        known: see `partitions`
        name: None: the default one
        cpus_per_node, memory_mb: of a node; 0: the site's default, or all
        seconds: time limit of the job; None: the partition's own

    Raises:
        ConfigError: no such partition, or it has no (or too few) GPUs, CPUs, memory or nodes, or a shorter limit.
    """
    partition = find_partition(known, name)
    if gpus_per_node and not partition.gpus:
        raise ConfigError(
            f"--partition {partition.name}: expected nodes with GPUs, sinfo shows none there. Name another partition, "
            "or give --gpus-per-node 0 --tasks-per-node N for a run on CPUs"
        )
    if gpus_per_node > partition.gpus:
        raise ConfigError(
            f"--gpus-per-node: expected at most {partition.gpus} in partition {partition.name}, came {gpus_per_node}"
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
        raise ConfigError(f"--nodes: expected at most {partition.nodes} in partition {partition.name}, came {nodes}")
    if seconds and partition.limit_seconds and seconds > partition.limit_seconds:
        raise ConfigError(
            f"--time: expected at most {partition.limit_seconds} s in partition {partition.name}, came {seconds} s"
        )


def check_hostfile(path: Path, *, nodes: int, tasks_per_node: int) -> None:
    """Refuse a DeepSpeed hostfile that is not of this allocation.

    Raises:
        ConfigError: it cannot be read, a line is wrong, or hosts or slots differ.
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
            raise ConfigError(f"{path}:{number}: expected 'HOST slots=N', each host once, came {line!r}")
        slots[match[1]] = int(match[2])
    wrong = {host: count for host, count in slots.items() if count != tasks_per_node}
    if len(slots) != nodes or wrong:
        came = f"{len(slots)} hosts" + "".join(f", {host} with {count}" for host, count in list(wrong.items())[:3])
        raise ConfigError(
            f"--hostfile {path}: expected {nodes} hosts with {tasks_per_node} slots each, as the job has, came {came}"
        )
