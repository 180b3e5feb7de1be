"""The GPU of a rank under every GPU binding of SLURM and torchrun; two ranks on one GPU are refused."""

from __future__ import annotations

import os
import socket

import pytest
from support.ranks import run_on_ranks

from pause_megatron.distributed.devices import device_index
from pause_megatron.distributed.ranks import Ranks, discover
from pause_megatron.errors import ConfigError


def step(local: int, **more: str) -> dict[str, str]:
    """Variables that srun sets for the tasks of one host."""
    place = {"SLURM_PROCID": str(local), "SLURM_LOCALID": str(local), "SLURM_STEP_NUM_TASKS": "4"}
    return {**place, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[1-2]", **more}


def torchrun(local: int, **more: str) -> dict[str, str]:
    place = {"RANK": str(local), "LOCAL_RANK": str(local), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    return {**place, "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", **more}


# How a job requests GPUs, the variables of each of four tasks, and the number of GPUs that it sees.
SEES_ALL = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
BINDINGS = {
    "--gpus-per-node=4": (lambda local: step(local, **SEES_ALL), 4, [0, 1, 2, 3]),
    "--gpus-per-node=4 --gpu-bind=none": (lambda local: step(local, **SEES_ALL), 4, [0, 1, 2, 3]),
    "--gpus-per-node=8, four tasks": (lambda local: step(local), 8, [0, 1, 2, 3]),
    "--gpus-per-task=1": (
        lambda local: step(local, CUDA_VISIBLE_DEVICES="0", SLURM_GPUS_PER_TASK="1"),  # cgroups: numbered from 0
        1,
        [0, 0, 0, 0],
    ),
    "--gpu-bind=single:1": (
        lambda local: step(local, CUDA_VISIBLE_DEVICES=str(local), SLURM_GPU_BIND="single:1"),
        1,
        [0, 0, 0, 0],
    ),
    "--gpu-bind=map_gpu:3,2,1,0": (
        lambda local: step(local, CUDA_VISIBLE_DEVICES=str(3 - local), SLURM_GPU_BIND="map_gpu:3,2,1,0"),
        1,
        [0, 0, 0, 0],
    ),
    "--ntasks-per-gpu=1": (lambda local: step(local, CUDA_VISIBLE_DEVICES=str(local)), 1, [0, 0, 0, 0]),
    "torchrun": (torchrun, 4, [0, 1, 2, 3]),
    "torchrun, CUDA_VISIBLE_DEVICES=4,5,6,7": (
        lambda local: torchrun(local, CUDA_VISIBLE_DEVICES="4,5,6,7"),
        4,
        [0, 1, 2, 3],
    ),
    "an own CUDA_VISIBLE_DEVICES by a wrapper": (
        lambda local: torchrun(local, CUDA_VISIBLE_DEVICES=str(local)),
        1,
        [0, 0, 0, 0],
    ),
    "alone": (lambda local: {}, 8, [0, 0, 0, 0]),
}


@pytest.mark.parametrize("binding", BINDINGS)
def test_every_binding_gives_each_rank_its_gpu(binding):
    told, visible, expected = BINDINGS[binding]
    environments = [told(local) for local in range(4)]
    found = [device_index(discover(each).local_rank, visible, each) for each in environments]
    assert found == expected
    assert all(index < visible for index in found)  # DeepSpeed uses LOCAL_RANK, which is set to this, as the device


@pytest.mark.parametrize("visible", [2, 3])
def test_too_few_gpus_are_one_error(visible):
    """`--gpu-bind=closest`, `--gpus-per-task=2`, or more tasks than GPUs."""
    environment = step(3, SLURM_GPU_BIND="closest", CUDA_VISIBLE_DEVICES="0,1")
    message = (
        rf"local rank 3 on {socket.gethostname()}: expected to see one GPU, or more than 3, got {visible} "
        r"\(CUDA_VISIBLE_DEVICES=0,1, SLURM_GPU_BIND=closest\); .*--gpus-per-task=1"
    )
    with pytest.raises(ConfigError, match=message):
        device_index(3, visible, environment)


def claim(port: int, uuids: list[str], errors: list[str]) -> str:
    """Return the message on a rank with this GPU, through a real store."""
    import torch.distributed as dist

    from pause_megatron.distributed.devices import claim_gpu

    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    ranks = Ranks(rank, rank, size, "127.0.0.1", port, "environment")
    error = ""
    try:
        claim_gpu(store, ranks, uuids[rank], errors[rank])
    except ConfigError as refused:
        error = str(refused)
    dist.barrier()
    keys = store.num_keys()
    dist.barrier()  # rank 0 hosts the store
    return error or f"{keys} keys"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def messages(uuids: list[str], errors: list[str] | None = None) -> set[str]:
    return set(run_on_ranks(len(uuids), claim, free_port(), uuids, errors or [""] * len(uuids)))


def test_two_ranks_on_one_gpu_are_named_on_every_rank():
    (text,) = messages(["GPU-a", "GPU-b", "GPU-c", "GPU-b"])
    one, other = sorted(["rank 1", "rank 3"], key=lambda name: text.index(name))
    assert text.startswith(f"{one} and {other} on {socket.gethostname()}: expected a GPU each, got one, GPU-b (CUDA_")
    assert f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}" in text
    assert "srun --gpus-per-task=1" in text


def test_one_gpu_per_rank_passes_with_a_few_keys():
    (text,) = messages(["GPU-a", "GPU-b", "GPU-c", "GPU-d"])
    # A count of rendezvous and a GPU for each rank; done, verdict, left, empty; torch's own count of its clients.
    assert int(text.split()[0]) <= 2 * 4 + 5


def test_one_rank_s_error_is_every_rank_s():
    (text,) = messages(["GPU-a", ""], ["", "local rank 1 on h: expected to see one GPU"])
    assert text == "local rank 1 on h: expected to see one GPU"


def take(port: int, visible: list[list[str]]) -> tuple[str, list]:
    """Return the device of a rank that sees these GPUs; torch's functions are replaced."""
    from types import SimpleNamespace
    from unittest import mock

    import torch
    import torch.distributed as dist

    from pause_megatron.distributed.devices import take_device

    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    own, current = visible[rank], []
    with (
        mock.patch.object(torch.cuda, "device_count", lambda: len(own)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=own[index])),
        mock.patch.object(torch.cuda, "set_device", current.append),
    ):
        try:
            found = str(take_device(Ranks(rank, rank, size, "127.0.0.1", port, "environment"), store))
        except ConfigError as error:
            found = str(error)
    dist.barrier()
    return found, [str(device) for device in current]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ([["a"], ["b"]], ["cuda:0", "cuda:0"]),
        ([["a", "b"], ["a", "b"]], ["cuda:0", "cuda:1"]),
        ([["a", "b"], ["b"]], ["cuda:0", "cuda:0"]),
    ],
)
def test_a_rank_makes_its_device_the_current_one(visible, devices):
    assert run_on_ranks(2, take, free_port(), visible) == [(device, [device]) for device in devices]


@pytest.mark.parametrize(
    ("visible", "message"), [([["a"], ["a"]], "expected a GPU each, got one, a"), ([["a"], []], "")]
)
def test_no_device_is_set_where_one_rank_has_none(visible, message):
    answers = run_on_ranks(2, take, free_port(), visible)
    assert answers[0] == answers[1] and message in answers[0][0] and answers[0][1] == []
