"""RMSNorm that supports sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for sequence parallelism.

    megatron-core's WrappedTorchNorm is the same module without sequence parallelism. There each tensor-parallel rank
    normalizes its own part of the sequence, so the weight's gradient must be summed over the ranks. That is done for
    parameters with the attribute `sequence_parallel` (`pause_megatron.model.sequence_parallel`).

    Args:
        config: Parameter type, and whether the sequence is split.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel  # Megatron-LM's attribute
