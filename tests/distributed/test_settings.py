"""Settings of CUDA, cuBLAS, NCCL and torch in a run, and deterministic mode in a training step."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from pause_megatron.config.load import load
from pause_megatron.distributed.settings import (
    compute_capability,
    cores_of_rank,
    max_connections,
    settings_of,
    threads_for_optimizer,
)

H100, B200 = (9, 0), (10, 0)
VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.mark.parametrize(
    ("tensor", "stage", "capability", "set_to"),
    [
        *((1, 1, H100, None), (2, 1, H100, "1"), (2, 1, None, "1"), (8, 2, (8, 0), "1")),
        *((2, 3, H100, None), (2, 1, B200, None), (8, 0, (12, 0), None), (1, 3, None, None)),
    ],
)
def test_one_queue_only_where_it_hides_tensor_parallel_collectives(tensor, stage, capability, set_to):
    assert max_connections(tensor, stage, capability).get("CUDA_DEVICE_MAX_CONNECTIONS") == set_to


def driver(*fails: str) -> SimpleNamespace:
    """NVIDIA's library for a GPU of compute capability 9.0, some of whose functions fail."""

    def answer(name: str):
        def call(*arguments):
            if name == "nvmlDeviceGetCudaComputeCapability":
                assert arguments[0].value == 42
                arguments[1]._obj.value, arguments[2]._obj.value = 9, 0
            if name == "nvmlDeviceGetHandleByIndex_v2":
                assert arguments[0] == 0
                ctypes.memmove(arguments[1], ctypes.byref(ctypes.c_void_p(42)), ctypes.sizeof(ctypes.c_void_p))
            return 999 if name in fails else 0

        return call

    names = ("nvmlInit_v2", "nvmlShutdown", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability")
    return SimpleNamespace(**{name: answer(name) for name in names})


def test_the_capability_is_the_driver_s_or_unknown():
    assert compute_capability(driver()) == (9, 0)
    for name in ("nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability"):
        assert compute_capability(driver(name)) is None
    assert compute_capability(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("everyone", "cores"),
    [
        ([("a", range(16))] * 8, [2] * 8),  # torchrun: all ranks share all cores
        ([("a", range(4 * i, 4 * i + 4)) for i in range(4)], [4] * 4),  # SLURM binds each task to its own
        ([("a", range(8)), ("b", range(8)), ("b", range(8))], [8, 4, 4]),
        ([("a", range(8)), ("a", range(4))], [6, 2]),
        ([("a", [0])] * 8, [1] * 8),
    ],
)
def test_a_rank_has_its_share_of_the_cores(everyone, cores):
    assert [cores_of_rank(everyone, rank) for rank in range(len(everyone))] == cores


@pytest.mark.parametrize(
    ("device", "offload", "given", "threads"),
    [
        ("cuda", "cpu", "1", len(os.sched_getaffinity(0))),
        ("cuda", "cpu", None, len(os.sched_getaffinity(0))),
        ("cuda", "cpu", "3", 7),  # the user's
        ("cuda", "none", "1", 7),
        ("cpu", "cpu", "1", 7),  # forward and backward run there too, and their rounding depends on it
    ],
)
def test_an_offloaded_optimizer_gets_the_rank_s_cores(device, offload, given, threads, monkeypatch):
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        context = SimpleNamespace(device=torch.device(device), rank=0)
        threads_for_optimizer({"zero_optimization": {"offload_optimizer": {"device": offload}}}, context)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def config(*overrides: str):
    return load(recipe="tiny-pause", overrides=["data.prefix=english", *overrides])


def state() -> tuple:
    cudnn = torch.backends.cudnn
    return (
        [os.environ.get(name) for name in VARIABLES],
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_settings_are_restored_and_the_user_s_take_precedence(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = state()
    with settings_of(config()):
        assert state() == before
    with settings_of(config("engine.deterministic=true")):
        assert state() == ([None, ":4096:8", "^NVLS,NVLSTree"], True, (True, False, False), False)
    assert state() == before
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    with settings_of(config("engine.deterministic=true", "parallel.tensor=2")):
        assert [os.environ[name] for name in VARIABLES] == ["32", ":4096:8", "Ring"]


# aten operators that torch's documentation of use_deterministic_algorithms says raise on a CUDA tensor.
RAISE = {
    *("nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "put_", "put", "histc", "median", "kthvalue"),
    *("_embedding_bag_dense_backward", "grid_sampler_2d_backward", "scatter_reduce", "_ctc_loss_backward"),
}
RAISE_FLOATING = {"cumsum", "cumsum_"}
RAISE_WITH_WEIGHTS = {"bincount"}


class Operators(TorchDispatchMode):
    """Which of them were called in a way that raises on a GPU, and how many others."""

    def __init__(self) -> None:
        super().__init__()
        self.raising: set[str] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        self.names.add(name)
        floating = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        weights = len(args) > 1 and args[1] is not None
        if name in RAISE or (name in RAISE_FLOATING and floating) or (name in RAISE_WITH_WEIGHTS and weights):
            self.raising.add(name)
        return operator(*args, **(kwargs or {}))


def deterministic_steps(overrides: list[str]) -> tuple[set[str], int]:
    """Two optimizer steps under the switch, on real ranks."""
    from support.measured import traffic

    with settings_of(load(overrides=overrides)), Operators() as operators:
        assert torch.are_deterministic_algorithms_enabled()
        traffic(overrides)
    return operators.raising, len(operators.names)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (1, ["engine.precision=bf16", "data.intra_document_masking=true"]),
        (1, ["model.tied=true", "pause.softmax=exclude"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "engine.precision=bf16"]),
        (2, ["engine.zero_stage=3", "parallel.recompute=full"]),
    ],
)
def test_a_training_step_obeys_deterministic_mode(ranks, extra):
    """It does not raise on a CPU, and calls no operator that would raise on a GPU."""
    overrides = [
        *("data.prefix=english", "model.layers=2", "model.hidden=32", "model.heads=2", "data.sequence_length=32"),
        *("batch.global_size=4", "batch.micro_size=2", "train.steps=2", "engine.deterministic=true", *extra),
    ]
    for raising, names in run_on_ranks(ranks, deterministic_steps, overrides):
        assert not raising
        assert names > 30
