"""Process groups: torch.distributed, DeepSpeed's communication backend, megatron-core's tensor/data-parallel split."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore, PrefixStore, Store

from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed.cpu import use_cpu_without_cuda
from pause_megatron.distributed.devices import take_device
from pause_megatron.distributed.groups import make_groups
from pause_megatron.distributed.mpu import MPU
from pause_megatron.distributed.ranks import Ranks, discover
from pause_megatron.distributed.rendezvous import compare_in_world, rendezvous
from pause_megatron.errors import ConfigError
from pause_megatron.terminal.log import set_rank


@dataclass(frozen=True)
class ParallelContext:
    """The process groups of a run, and this rank's position in them.

    Tensor-parallel ranks are neighbours (0 1 | 2 3 for tensor = 2), so that they share a host; data-parallel ranks
    hold the same shard of the model and see different windows.

    Attributes:
        rank: Global rank.
        world_size: Number of ranks.
        local_rank: Rank on this host, as the launcher counts.
        tp_rank: Rank in the tensor-parallel group.
        tp_size: Tensor-parallel size.
        dp_rank: Rank in the data-parallel group.
        dp_size: Data-parallel size.
        tp_group: The ranks that share one replica of the model.
        dp_group: The ranks that hold the same shard.
        device: Device of this rank.
        mpu: Argument of `deepspeed.initialize(mpu=...)`.
        owns_world: Whether `close` destroys the torch.distributed world.
    """

    rank: int
    world_size: int
    local_rank: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    device: torch.device
    mpu: MPU
    owns_world: bool = field(repr=False)
    _earlier_groups: frozenset[dist.ProcessGroup] = field(repr=False)
    _environment: Mapping[str, str | None] = field(repr=False)

    def close(self) -> None:
        """Destroy the process groups, so that another topology can be initialized in this process.

        Environment variables are restored, too: a job that is submitted from here would inherit them.
        """
        parallel_state.destroy_model_parallel()
        _forget_deepspeed_groups()
        if self.owns_world:
            dist.destroy_process_group()
        else:
            for group in set(_groups()) - self._earlier_groups:
                dist.destroy_process_group(group)
        for key, value in self._environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

    def __enter__(self) -> ParallelContext:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def initialize(
    parallel: ParallelSection,
    *,
    device: str | torch.device | None = None,
    timeout: timedelta = timedelta(minutes=10),
    connect_seconds: float = 600,
    ranks: Ranks | None = None,
    same: Mapping[str, str] | None = None,
) -> ParallelContext:
    """Initialize torch.distributed and DeepSpeed, and split the ranks into tensor- and data-parallel groups.

    A torch.distributed world that exists already is used, and not destroyed by `close()`.

    Args:
        parallel: Tensor-parallel size and sequence parallelism.
        device: "cpu" or "cuda"; default: cuda where there is one.
        timeout: Timeout of a collective.
        connect_seconds: Timeout of the rendezvous in seconds.
        ranks: Rank and world size; default: what `discover()` returns.
        same: Name -> value of what must be the same on every rank, in the order of a message.

    Raises:
        ConfigError: parallel.tensor does not divide the number of ranks, there is no such device, two ranks have one
            GPU, ranks do not reach each other, or are not of one run. On every rank, whichever fails.
    """
    ranks = discover() if ranks is None else ranks
    set_rank(ranks.rank)
    owns_world = not dist.is_initialized()
    world_size = ranks.world_size if owns_world else dist.get_world_size()
    kind, failure = _checked_device(parallel, device, world_size)
    record = {**(same or {}), "device": kind, "launcher": ranks.launcher}

    use_cpu_without_cuda()
    environment = {key: os.environ.get(key) for key in ranks.environment()}
    store = None
    if owns_world:
        os.environ.update(ranks.environment())
        store = _open_store(ranks, "nccl" if kind == "cuda" else "gloo", timeout, connect_seconds, record, failure)
    elif same and world_size > 1:
        compare_in_world(record, failure)
    elif failure:
        raise ConfigError(failure)
    target = torch.device("cpu")
    if kind == "cuda":
        target = take_device(ranks, store if ranks.world_size > 1 else None)
        os.environ["LOCAL_RANK"] = str(target.index)
    if store is not None:
        _start_world(ranks, store, "nccl" if kind == "cuda" else "gloo", timeout)
    earlier = frozenset(_groups())
    _join_deepspeed(timeout)
    make_groups(parallel.tensor, timeout)
    # Nothing draws from the device's default generator (no dropout; weights have generators of their own). But
    # megatron-core forks its RNG tracker where it allocates weights and under sequence parallelism. The tracker for
    # inference has a fork() that does nothing.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=ranks.local_rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=world_size // parallel.tensor,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        device=target,
        mpu=MPU(),
        owns_world=owns_world,
        _earlier_groups=earlier,
        _environment=environment,
    )


def started_ranks() -> int:
    """Return the world size: that of torch.distributed if it is initialized, else the launcher's."""
    return dist.get_world_size() if dist.is_initialized() else discover().world_size


def _device_kind(device: str | torch.device | None) -> str:
    available = torch.cuda.is_available()
    kind = ("cuda" if available else "cpu") if device is None else torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected 'cpu' or 'cuda', got {kind!r}")
    if kind == "cuda" and not available:
        raise ConfigError("device: expected a CUDA device on this host, got none that torch can use")
    if kind == "cpu" and available:
        count = torch.cuda.device_count()
        raise ConfigError(
            f"device: expected no visible CUDA device for 'cpu', got {count}; set CUDA_VISIBLE_DEVICES='' at the start"
        )
    return kind


def _check_split(parallel: ParallelSection, world_size: int) -> None:
    if parallel.tensor > world_size:
        raise ConfigError(
            f"parallel.tensor: expected at most the number of ranks, {world_size}, got {parallel.tensor}; "
            "start more ranks or lower it"
        )
    if world_size % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor: expected a divisor of the number of ranks, {world_size}, got {parallel.tensor}"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true: expected parallel.tensor >= 2, got 1")


def _checked_device(parallel: ParallelSection, device: str | torch.device | None, world_size: int) -> tuple[str, str]:
    """Return the kind of this rank's device, and why the rank cannot take part; "": it can."""
    kind = "unknown"
    try:
        kind = _device_kind(device)
        _check_split(parallel, world_size)
    except ConfigError as error:
        return kind, str(error)
    return kind, ""


def _open_store(
    ranks: Ranks,
    backend: str,
    timeout: timedelta,
    connect_seconds: float,
    record: Mapping[str, str],
    failure: str,
) -> Store:
    if ranks.launcher != "alone":
        store = rendezvous(ranks, backend, connect_seconds, record, failure)
    elif failure:
        raise ConfigError(failure)
    else:
        store = HashStore()
    store.set_timeout(timeout)
    return store


def _start_world(ranks: Ranks, store: Store, backend: str, timeout: timedelta) -> None:
    dist.init_process_group(
        backend,
        timeout=timeout,
        rank=ranks.rank,
        world_size=ranks.world_size,
        store=PrefixStore("default_pg", store),
    )


def _join_deepspeed(timeout: timedelta) -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a long log line about a missing accelerator
    # Imported here: DeepSpeed is optional for other uses of the package, and its import takes seconds.
    import deepspeed.comm
    from deepspeed.ops import __compatible_ops__

    # A shared-memory all-reduce for inference on CPUs. Training never calls it, but DeepSpeed compiles it at the first
    # start. A process that is killed meanwhile leaves a stale lock, on which every later start would wait.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, timeout=timeout, verbose=False
    )


def _forget_deepspeed_groups() -> None:
    # DeepSpeed keeps the groups and the mpu of the last engine in module globals.
    from deepspeed.utils import groups

    groups._release_process_group_references()


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)
