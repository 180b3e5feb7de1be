"""Data-sheet figures of GPUs and of the machines they usually sit in, for `plan`, `benchmark` and MFU."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU and the machine it usually sits in.

    Attributes:
        name: Name that `--gpu` takes.
        cuda_name: Regular expression of the name that CUDA reports.
        memory_bytes: Total memory, about what torch reports.
        peak_flops: Peak of dense bf16 matrix products, FLOP/s (NVIDIA's data sheets).
        memory_bandwidth: Bandwidth of its memory, bytes/s (NVIDIA's data sheets).
        link_bytes: NVLink bandwidth to the other GPUs of the machine, bytes/s in one direction.
        link_ranks: GPUs that NVLink joins; a ring of more goes over PCIe.
        network_bytes: Bandwidth of the GPU's network adapter, bytes/s in one direction (one adapter a GPU, as in DGX).
        host_link_bytes: Bandwidth to the host, bytes/s in one direction (PCIe 4 or 5 x16, or NVLink-C2C).
    """

    name: str
    cuda_name: str
    memory_bytes: float
    peak_flops: float
    memory_bandwidth: float
    link_bytes: float
    link_ranks: int
    network_bytes: float
    host_link_bytes: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", r"A100\S*[- ]40GB", 39.4 * GIB, 312e12, 1.555e12, 300e9, 8, 25e9, 32e9),
        Gpu("a100-80", r"A100\S*[- ]80GB", 79.2 * GIB, 312e12, 2.039e12, 300e9, 8, 25e9, 32e9),
        Gpu("a800", r"\bA800\b", 79.2 * GIB, 312e12, 2.039e12, 200e9, 8, 25e9, 32e9),
        Gpu("h100-pcie", r"\bH100 PCIe", 79.1 * GIB, 756e12, 2.0e12, 300e9, 2, 50e9, 64e9),  # bridges join two
        Gpu("h100-94", r"\bH100 NVL", 93.1 * GIB, 835.5e12, 3.938e12, 300e9, 2, 50e9, 64e9),
        Gpu("h100", r"\bH100\b", 79.1 * GIB, 989.4e12, 3.352e12, 450e9, 8, 50e9, 64e9),
        Gpu("h800", r"\bH800\b(?! PCIe)", 79.1 * GIB, 989.4e12, 3.352e12, 200e9, 8, 50e9, 64e9),
        Gpu("h20", r"\bH20\b", 95.0 * GIB, 148e12, 4.0e12, 450e9, 8, 50e9, 64e9),
        Gpu("h200-nvl", r"\bH200 NVL", 139.7 * GIB, 835.5e12, 4.8e12, 450e9, 4, 50e9, 64e9),
        Gpu("h200", r"\bH200\b", 139.7 * GIB, 989.4e12, 4.8e12, 450e9, 8, 50e9, 64e9),
        Gpu("gh200", r"\bGH200\b", 94.5 * GIB, 989.4e12, 4.0e12, 450e9, 1, 50e9, 450e9),
        Gpu("b200", r"\bB200\b", 178.4 * GIB, 2250e12, 8.0e12, 900e9, 8, 50e9, 64e9),
        Gpu("gb200", r"\bGB200\b", 184.0 * GIB, 2500e12, 8.0e12, 900e9, 72, 50e9, 450e9),
        Gpu("b300", r"\bB300\b", 267.0 * GIB, 2250e12, 8.0e12, 900e9, 8, 100e9, 64e9),
        Gpu("gb300", r"\bGB300\b", 277.0 * GIB, 2500e12, 8.0e12, 900e9, 72, 100e9, 450e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its name in the table.

    Args:
        name: Name that `--gpu` takes.

    Raises:
        ConfigError: The table has no such name.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu: expected one of {', '.join(GPUS)}; got {name!r}{nearest(name, GPUS)}")
    return GPUS[name]


def device_peak_flops(config: ResolvedConfig, cuda_name: str | None) -> float | None:
    """Return the peak of one device for MFU, FLOP/s: `log.peak_tflops`, else the GPU's peak in dense bf16.

    Args:
        config: Resolved configuration; an fp32 run has no peak in the table.
        cuda_name: Name that CUDA reports; None where the device is not a GPU.

    Returns:
        The peak, or None where it is not known.
    """
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    gpu = gpu_of_cuda(cuda_name) if cuda_name and config.engine.precision == "bf16" else None
    return None if gpu is None else gpu.peak_flops


def gpu_of_cuda(cuda_name: str) -> Gpu | None:
    """Return the GPU with a CUDA name, for example "NVIDIA H100 80GB HBM3".

    Args:
        cuda_name: Name that CUDA reports.

    Returns:
        The GPU; None where it is not in the table, or is a MIG slice with a part of the peak.
    """
    if "MIG " in cuda_name:
        return None
    return next((gpu for gpu in GPUS.values() if re.search(gpu.cuda_name, cuda_name)), None)
