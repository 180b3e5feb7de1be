"""Device and package versions of a benchmark."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from pause_megatron.config.gpus import gpu_of_cuda
from pause_megatron.distributed import ParallelContext
from pause_megatron.plan.layout import Device
from pause_megatron.versions import installed_version

VERSIONS = ("torch", "megatron-core", "deepspeed", "triton")


@dataclass(frozen=True)
class Machine:
    """A rank's device and software.

    Attributes:
        device: Kind of device, "cuda" or "cpu".
        cuda_name: Name that CUDA reports; None on a CPU.
        gpu: Name in `config.gpus.GPUS`; None where the table has none.
        ranks: World size.
        python: Version of Python.
        packages: Version of each distribution; None where it is not installed.
    """

    device: Device
    cuda_name: str | None
    gpu: str | None
    ranks: int
    python: str
    packages: dict[str, str | None]

    @classmethod
    def of(cls, context: ParallelContext) -> Machine:
        """Return the machine of this rank.

        Args:
            context: Process groups and device.
        """
        cuda = context.device.type == "cuda"
        cuda_name = torch.cuda.get_device_name(context.device) if cuda else None
        gpu = gpu_of_cuda(cuda_name) if cuda_name else None
        return cls(
            device="cuda" if cuda else "cpu",
            cuda_name=cuda_name,
            gpu=gpu.name if gpu else None,
            ranks=context.world_size,
            python=platform.python_version(),
            packages={name: installed_version(name) for name in VERSIONS},
        )
