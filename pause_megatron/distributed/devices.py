"""Device assignment: which GPU a rank uses under SLURM and torchrun, one rank a GPU.

A task either sees only its own GPU (`--gpus-per-task=1`, `--gpu-bind=single:1`, `map_gpu`, `--ntasks-per-gpu=1`, a
CUDA_VISIBLE_DEVICES of its own), which is then device 0, or all GPUs of its host, of which it takes the one of its
local rank. DeepSpeed makes LOCAL_RANK the current device, so LOCAL_RANK is the index of the device.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping

import torch
from torch.distributed import Store

from pause_megatron.distributed.ranks import Ranks
from pause_megatron.distributed.rendezvous import collect_failures, next_round
from pause_megatron.errors import ConfigError

_REPORTED = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_STEP_GPUS")
_ADVICE = (
    "let each task see only its own GPU (srun --gpus-per-task=1) or all of its host (--gpus-per-node=N "
    "--gpu-bind=none, CUDA_VISIBLE_DEVICES not set), and start one rank for each GPU"
)


def device_index(local_rank: int, visible: int, environment: Mapping[str, str]) -> int:
    """Return the index of a rank's GPU among the visible ones, which is also its LOCAL_RANK for DeepSpeed.

    Args:
        local_rank: Local rank as the launcher counts.
        visible: Number of GPUs that this process sees, at least 1.
        environment: Environment variables, quoted in the error.

    Raises:
        ConfigError: It sees several GPUs, but not as many as its local rank needs.
    """
    if visible == 1:
        return 0
    if local_rank < visible:
        return local_rank
    seen = ", ".join(f"{name}={environment[name]}" for name in _REPORTED if name in environment)
    raise ConfigError(
        f"local rank {local_rank} on {socket.gethostname()}: expected to see one GPU, or more than {local_rank}, got "
        f"{visible}{f' ({seen})' if seen else ''}; {_ADVICE}"
    )


def take_device(ranks: Ranks, store: Store | None, environment: Mapping[str, str] | None = None) -> torch.device:
    """Return this rank's GPU and make it the current device, after checking that no other rank has it.

    Every rank calls this.

    Args:
        ranks: Rank and local rank of this process.
        store: The run's store; None in a single process.
        environment: Environment variables; default: os.environ.

    Raises:
        ConfigError: A rank sees too few GPUs, or two ranks have one. On every rank.
    """
    index, error = 0, ""
    try:
        environment = os.environ if environment is None else environment
        index = device_index(ranks.local_rank, torch.cuda.device_count(), environment)
    except ConfigError as failure:
        error = str(failure)
    if store is None and error:
        raise ConfigError(error)
    if store is not None:
        claim_gpu(store, ranks, "" if error else str(torch.cuda.get_device_properties(index).uuid), error)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # DeepSpeed's barriers name no device, so torch takes the current one: the right one, but with a warning.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)
    return device


def claim_gpu(store: Store, ranks: Ranks, uuid: str, error: str = "") -> None:
    """Check that no two ranks have one GPU, on which NCCL would fail or hang. Every rank calls this.

    A rank sends one key and a few messages, however many ranks there are.

    Args:
        store: The run's store.
        ranks: Rank and world size of this process.
        uuid: UUID of this rank's GPU.
        error: Why this rank has no GPU; "": it has one.

    Raises:
        ConfigError: Two ranks have one GPU, or a rank has none. On every rank.
    """
    keys = next_round(store, ranks)
    if not error:
        name = f"rank {ranks.rank}"
        owner = keys.compare_set(f"gpu/{uuid}", "", name).decode()
        if owner != name:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            error = (
                f"{owner} and {name} on {socket.gethostname()}: expected a GPU each, got one, {uuid} "
                f"(CUDA_VISIBLE_DEVICES={visible}); {_ADVICE}"
            )
    if errors := collect_failures(keys, ranks, error):
        more = f"\n(and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(errors[0] + more)
