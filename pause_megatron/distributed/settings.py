"""What CUDA, cuBLAS, NCCL and torch are told before the first of them starts, as the configuration wants it."""

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

# The workspace of cuBLAS that torch asks for in deterministic mode; and no sums of NCCL within a switch (NVLS), whose
# order is the switch's. Rings and trees add in the order of the topology, which is the same in each start on the same
# hosts.
_DETERMINISTIC_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}


@contextmanager
def settings_of(config: ResolvedConfig) -> Iterator[None]:
    """Environment variables and torch's switches of a run, while it lasts. Enter it before anything uses CUDA.

    A variable that the user has set keeps the user's value.

    Args:
        config: parallel.tensor, the ZeRO stage and engine.deterministic decide.
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
    """CUDA_DEVICE_MAX_CONNECTIONS=1 where megatron-core counts on the order in which kernels are launched.

    Tensor-parallel layers start a collective before the matrix product that hides it; with one hardware queue it gets
    its place on the GPU first. Blackwell needs no such help, and ZeRO 3 prefetches on streams of its own, which one
    queue would put behind each other.

    Args:
        tensor: tensor-parallel ranks.
        stage: of ZeRO.
        capability: compute capability of the GPU; None: not known.
    """
    helps = tensor > 1 and stage < 3 and (capability is None or capability < _BLACKWELL)
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if helps else {}


def compute_capability(nvml: Any = None) -> tuple[int, int] | None:
    """That of this host's first GPU by NVIDIA's management library, which leaves CUDA alone; None: not known.

    Args:
        nvml: the library; default: the driver's.
    """
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    with suppress(OSError, AttributeError):  # no driver, or one that is older than these names
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
    """Give torch this rank's share of the host's cores where the optimizer steps on it. Every rank calls this.

    Launchers set OMP_NUM_THREADS=1, which is right for ranks whose work is on a GPU; a larger number stays.

    Args:
        ds_config: the complete DeepSpeed dictionary.
    """
    offload = (ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    given = os.environ.get("OMP_NUM_THREADS", "1")
    if offload == "none" or context.device.type == "cpu" or given != "1":
        return
    everyone = gather_objects((socket.gethostname(), sorted(os.sched_getaffinity(0))))
    torch.set_num_threads(cores_of_rank(everyone, context.rank))


def cores_of_rank(everyone: Sequence[tuple[str, Collection[int]]], rank: int) -> int:
    """Cores of a rank, at least one: its own, and its share of those that others of its host may use too.

    Args:
        everyone: host and usable cores of each rank. Bound tasks have cores of their own, others share all.
    """
    host, cores = everyone[rank]
    neighbours = [set(others) for name, others in everyone if name == host]
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
    """Torch's switches. `scaled_dot_product_attention` obeys the first: flash and memory-efficient attention take a
    backward pass without atomic additions, cuDNN's is not chosen. `varlen_attn` (torch 2.15) would choose it all the
    same, so it is switched off."""
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    earlier = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a kernel for every empty tensor
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(earlier[0], warn_only=earlier[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = flags[:2]
        torch.backends.cuda.enable_cudnn_sdp(flags[2])
