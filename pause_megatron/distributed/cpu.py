"""Running megatron-core on a host without CUDA: a current device for it."""

from __future__ import annotations

import torch


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def use_cpu_without_cuda() -> None:
    """Make `torch.cuda.current_device()` return `cpu` where there is no CUDA; elsewhere do nothing.

    megatron-core (0.16) passes the result as `device=` to the tensors that it allocates in rotary embeddings,
    tensor-parallel mappings and the sequence-parallel linear layer. Nothing else keeps it from running on CPUs with
    gloo.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu_device  # type: ignore[assignment]  # torch declares an int
