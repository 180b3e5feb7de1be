"""What a benchmark ran on: device, its peak, versions."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from pause_megatron.config.gpus import gpu_of_cuda
from pause_megatron.config.schema import RunConfig
from pause_megatron.distributed import ParallelContext

VERSIONS = ("torch", "megatron-core", "deepspeed", "triton")


@dataclass(frozen=True)
class Machine:
    """A rank's device, and what runs on it.

    Attributes:
        device: "cuda" or "cpu"
        cuda_name: what CUDA calls it; None on a CPU
        gpu: its name in `config.gpus.GPUS`; None: not in the table
        ranks: in all
        python: version
        packages: distribution -> version; None: not installed
    """

    device: str
    cuda_name: str | None
    gpu: str | None
    ranks: int
    python: str
    packages: dict[str, str | None]

    @classmethod
    def of(cls, context: ParallelContext) -> Machine:
        """This rank's."""
        cuda = context.device.type == "cuda"
        cuda_name = torch.cuda.get_device_name(context.device) if cuda else None
        gpu = gpu_of_cuda(cuda_name) if cuda_name else None
        return cls(
            device=context.device.type,
            cuda_name=cuda_name,
            gpu=gpu.name if gpu else None,
            ranks=context.world_size,
            python=platform.python_version(),
            packages={name: _version(name) for name in VERSIONS},
        )


def device_peak_flops(config: RunConfig, machine: Machine) -> float | None:
    """Peak of one device, FLOP/s: `log.peak_tflops`, else the GPU's in dense bf16; None: not known."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    gpu = gpu_of_cuda(machine.cuda_name) if machine.cuda_name else None
    return gpu.peak_flops if gpu is not None and config.engine.precision == "bf16" else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
