"""Asynchronous copies from host to device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a host tensor to the device without blocking the host, through pinned memory.

    Args:
        tensor: Tensor on the CPU.
        device: Target device.
    """
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
