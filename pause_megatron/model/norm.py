"""RMSNorm that sequence parallelism can use."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for what sequence parallelism needs.

    megatron-core's WrappedTorchNorm makes the same module but refuses sequence parallelism. There each tensor-parallel
    rank normalises its own part of the sequence, so the weight's gradients must be summed over the ranks: parameters
    with `sequence_parallel` set get that sum (`pause_megatron.model.sequence_parallel`).

    Args:
        config: gives the parameter type and whether the sequence is split.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel
