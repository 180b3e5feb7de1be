"""Environment variables and torch switches of a run, set before CUDA, cuBLAS and NCCL start."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from typing import Any

import torch

from pause_megatron.config.deepspeed import zero_stage
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.distributed.context import ParallelContext

_BLACKWELL = (10, 0)  # compute capability

# The cuBLAS workspace that torch requires in deterministic mode; and no NCCL reductions inside a switch (NVLS), whose
# order varies. Rings and trees reduce in the order of the topology, which is the same at each start on the same hosts.
_DETERMINISTIC_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}


@contextmanager
def settings_of(config: ResolvedConfig) -> Iterator[None]:
    """Set the environment variables and torch switches of a run while the body runs. Enter it before CUDA is used.

    A variable that the user has set keeps its value.

    Args:
        config: Its parallel.tensor, ZeRO stage and engine.deterministic decide.
    """
    stage = zero_stage(config)
    wanted = max_connections(
        config.parallel.tensor, stage, compute_capability() if config.parallel.tensor > 1 else None
    )
    with ExitStack() as restoring:
        restoring.enter_context(_variables(wanted))
        if config.engine.deterministic:
            restoring.enter_context(_variables(_DETERMINISTIC_VARIABLES))
            restoring.enter_context(_deterministic_torch())
        yield


def max_connections(tensor: int, stage: int, capability: tuple[int, int] | None) -> dict[str, str]:
    """Return CUDA_DEVICE_MAX_CONNECTIONS=1 where megatron-core relies on the order in which kernels are launched.

    Tensor-parallel layers launch a collective before the matrix product that hides it; with one hardware queue it is
    scheduled first. Blackwell does not need this. ZeRO-3 prefetches on streams of its own, which one queue would
    serialize.

    Args:
        tensor: Tensor-parallel size.
        stage: ZeRO stage.
        capability: Compute capability of the GPU; None: not known.
    """
    helps = tensor > 1 and stage < 3 and (capability is None or capability < _BLACKWELL)
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if helps else {}


def compute_capability(nvml: Any = None) -> tuple[int, int] | None:
    """Return the compute capability of this host's first GPU, without initializing CUDA; None: not known.

    Args:
        nvml: NVIDIA's management library; default: the driver's.
    """
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    with suppress(OSError, AttributeError):  # no driver, or one without these functions
        nvml = ctypes.CDLL("libnvidia-ml.so.1") if nvml is None else nvml
        if nvml.nvmlInit_v2():
            return None
        try:
            if nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
                return None
            if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
                return None
            return major.value, minor.value
        finally:
            nvml.nvmlShutdown()
    return None


def threads_for_optimizer(ds_config: Mapping[str, Any], context: ParallelContext) -> None:
    """Give torch this rank's share of the host's cores where the optimizer is offloaded. Every rank calls this.

    Launchers set OMP_NUM_THREADS=1, which is right for ranks that work on a GPU. A larger number is kept.

    Args:
        ds_config: The complete DeepSpeed configuration.
        context: Process groups and device of this rank.
    """
    offload = (ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    given = os.environ.get("OMP_NUM_THREADS", "1")
    if offload == "none" or context.device.type == "cpu" or given != "1":
        return
    by_rank = gather_objects((socket.gethostname(), sorted(os.sched_getaffinity(0))))
    torch.set_num_threads(cores_of_rank(by_rank, context.rank))


def cores_of_rank(by_rank: Sequence[tuple[str, Collection[int]]], rank: int) -> int:
    """Return the number of cores for a rank, at least 1: its own, and its share of those that it shares.

    Args:
        by_rank: Host and usable cores of each rank. Bound tasks have cores of their own, others share all.
        rank: The rank.
    """
    host, cores = by_rank[rank]
    neighbours = [set(others) for name, others in by_rank if name == host]
    return max(1, int(sum(Fraction(1, sum(core in others for others in neighbours)) for core in cores)))


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def _deterministic_torch() -> Iterator[None]:
    """Switch torch to deterministic algorithms while the body runs.

    Under `use_deterministic_algorithms`, `scaled_dot_product_attention` takes backward passes without atomic additions
    in flash and memory-efficient attention, and does not choose cuDNN's. `varlen_attn` (torch 2.15) would choose
    cuDNN's all the same, so that is switched off.
    """
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # typed as a plain module, without its switch
    fill = memory.fill_uninitialized_memory
    earlier = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # costs a kernel for every empty tensor
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(earlier[0], warn_only=earlier[1])
        memory.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = flags[:2]
        torch.backends.cuda.enable_cudnn_sdp(flags[2])
