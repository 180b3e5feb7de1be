"""What megatron-core needs on a machine without CUDA: nothing but a current device."""

from __future__ import annotations

import torch


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def use_cpu_without_cuda() -> None:
    """Let `torch.cuda.current_device()` answer `cpu` where there is no CUDA; elsewhere do nothing.

    megatron-core (0.16) passes that call's answer as `device=` to the tensors that it allocates in rotary embeddings,
    tensor-parallel mappings and the sequence-parallel linear layer. It is its only obstacle to running on a CPU with
    gloo.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
