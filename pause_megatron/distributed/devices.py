"""Which GPU a rank computes on, in every way that SLURM and torchrun hand them out: one rank for each.

A task either sees its own GPU alone (`--gpus-per-task=1`, `--gpu-bind=single:1`, `map_gpu`, `--ntasks-per-gpu=1`, a
CUDA_VISIBLE_DEVICES of its own), which is then device 0, or all GPUs of its host, of which it takes the one of its
local rank. DeepSpeed makes LOCAL_RANK the current device, so LOCAL_RANK is the index of the device.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist

from pause_megatron.distributed.meeting import agree, own_keys
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import ConfigError

_SAYS_WHY = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_STEP_GPUS")
_ADVICE = (
    "let each task see its own GPU alone (srun --gpus-per-task=1) or all of its host (--gpus-per-node=N "
    "--gpu-bind=none, CUDA_VISIBLE_DEVICES not set), and start one rank for each GPU"
)


def device_index(local_rank: int, visible: int, environment: Mapping[str, str]) -> int:
    """Index of a rank's GPU among those that it sees, which is also its LOCAL_RANK for DeepSpeed.

    Args:
        local_rank: as the launcher counts the ranks of a host.
        visible: GPUs that this process sees, at least 1.
        environment: is quoted in the error.

    Raises:
        ConfigError: it sees several, but not as many as its local rank asks for.
    """
    if visible == 1:
        return 0
    if local_rank < visible:
        return local_rank
    seen = ", ".join(f"{name}={environment[name]}" for name in _SAYS_WHY if name in environment)
    raise ConfigError(
        f"local rank {local_rank} on {socket.gethostname()}: expected to see one GPU, or more than {local_rank}, got "
        f"{visible}{f' ({seen})' if seen else ''}; {_ADVICE}"
    )


def take_device(ranks: Ranks, store: dist.Store | None, environment: Mapping[str, str] | None = None) -> torch.device:
    """This rank's GPU, made the current one once no other rank of the run has the same. Every rank calls this.

    Args:
        store: of the run; None: a process that is alone.
        environment: default: os.environ.

    Raises:
        ConfigError: a rank sees too few GPUs, or two ranks have one. On every rank.
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
    # DeepSpeed's barriers name no device. Torch takes the current one, which is the right one from here on.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)
    return device


def claim_gpu(store: dist.Store, ranks: Ranks, uuid: str, error: str = "") -> None:
    """Make sure that no two ranks of a run have one GPU, on which NCCL would fail or hang. Every rank calls this.

    A rank's share is one key and a few messages, however many ranks there are.

    Args:
        store: of the run.
        uuid: of this rank's GPU.
        error: why this rank has none; "": it has one.

    Raises:
        ConfigError: two ranks have one GPU, or a rank has an error. On every rank.
    """
    keys = own_keys(store, ranks)
    if not error:
        name = f"rank {ranks.rank}"
        owner = keys.compare_set(f"gpu/{uuid}", "", name).decode()
        if owner != name:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            error = (
                f"{owner} and {name} on {socket.gethostname()}: expected a GPU each, got one, {uuid} "
                f"(CUDA_VISIBLE_DEVICES={visible}); {_ADVICE}"
            )
    if errors := agree(keys, ranks, error):
        more = f"\n(and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(errors[0] + more)
