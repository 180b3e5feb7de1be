"""What a benchmark ran on: device and versions."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from pause_megatron.config.gpus import gpu_of_cuda
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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
