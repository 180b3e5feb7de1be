"""RMSNorm that supports sequence parallelism, and that of all heads together."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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


class _WholeNorm(RMSNorm):
    """RMSNorm over the channels of all heads together, where each rank has some heads (OLMo 2).

    The mean square is that of all tensor-parallel ranks, forward and backward. Where ranks share a key head, each head
    is there equally often, which leaves the mean unchanged. Each rank has the whole weight, in the order of heads, and
    a gradient for its own heads only; `pause_megatron.model.sequence_parallel` sums those.

    Args:
        config: Sizes.
        hidden_size: Channels of a head, as megatron-core's attention passes it.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        self.heads = self.heads_of(config)
        super().__init__(config, self.heads * hidden_size, eps)
        self.group = parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def heads_of(config: TransformerConfig) -> int:
        """Return the number of heads of all ranks."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalize queries or keys.

        Args:
            x: [seq, batch, heads of this rank, channels].
        """
        own, channels = x.shape[-2:]
        ranks = self.group.size()
        if ranks == 1:
            return super().forward(x.flatten(-2)).view_as(x)
        values = x.float()
        total = reduce_from_tensor_model_parallel_region(values.square().sum((-2, -1), keepdim=True), group=self.group)
        mean = copy_to_tensor_model_parallel_region(total, group=self.group) / (ranks * own * channels)
        first = self.group.rank() * self.heads // ranks
        weight = self.weight.view(self.heads, channels).narrow(0, first, own)
        return (values * torch.rsqrt(mean + self.eps) * weight).to(x.dtype)


class WholeQueryNorm(_WholeNorm):
    """RMSNorm over all query heads together. Arguments as RMSNorm, hidden_size that of a head."""

    @staticmethod
    def heads_of(config: TransformerConfig) -> int:
        """Return the number of query heads of all ranks."""
        return config.num_attention_heads


class WholeKeyNorm(_WholeNorm):
    """RMSNorm over all key heads together. Arguments as RMSNorm, hidden_size that of a head."""

    @staticmethod
    def heads_of(config: TransformerConfig) -> int:
        """Return the number of key heads of all ranks."""
        return config.num_query_groups or config.num_attention_heads
