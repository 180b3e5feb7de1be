"""Core attention on torch's scaled_dot_product_attention, in place of megatron-core's DotProductAttention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pause_megatron.model.spans import TextSpans, attend_apart


def segment_mask(segments: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Who sees whom in windows of several texts: a token sees its own segment up to itself, and a prefix all of itself.

    Token i sees token j if both are of the same segment, and j <= i or both are in the segment's prefix. Padding is
    segment -1, so that it sees padding (itself at least: no softmax is over nothing) and nobody else sees it.

    Args:
        segments: int [batch, seq].
        prefix: bool [batch, seq]; None: causal.

    Returns:
        bool [batch, 1, seq, seq], True where a query must not look, as SDPACoreAttention wants it. `TextSpans` says the
        same without N^2 booleans; this is its definition, and serves prefixes that are not at the beginning.
    """
    seq = segments.shape[1]
    seen = torch.ones(seq, seq, dtype=torch.bool, device=segments.device).tril_()
    if prefix is not None:
        seen = seen | (prefix[:, :, None] & prefix[:, None, :])
    return ~(seen & (segments[:, :, None] == segments[:, None, :]))[:, None]


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0, or -inf where the bool mask is True. The same shape.

    torch's kernels take a mask in the dtype of the queries. Of booleans they make one, in every layer anew, and keep it
    for the backward pass.
    """
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of a micro-batch, made once for all layers.

    Attributes:
        cos, sin: fp32 [seq, 1 or batch, channels / 2].
        rotate: as `pause_megatron.model.kernels.Kernels.rotate`.
    """

    cos: Tensor
    sin: Tensor
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, angles: Tensor, rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rotation:
        """From megatron-core's angles [seq, 1 or batch, 1, channels], whose second half repeats the first."""
        half = angles[:, :, 0, : angles.shape[-1] // 2].float()
        return cls(half.cos().contiguous(), half.sin().contiguous(), rotate)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn queries or keys [seq, batch, heads, channels]."""
        return self.rotate(x, self.cos, self.sin)


@dataclass(frozen=True)
class MaskAndRotation:
    """Takes the place of an attention mask where the core attention turns queries and keys itself.

    Attributes:
        mask: as `SDPACoreAttention.forward`.
        rotation: of queries and keys.
    """

    mask: Tensor | TextSpans | None
    rotation: Rotation


class SDPACoreAttention(MegatronModule):
    """Softmax attention of the heads on this rank: causal, or as spans or an explicit mask say.

    megatron-core's own local core wants CUDA (mask buffers, a random-number fork), materialises the scores, and
    repeats keys and values for grouped queries. This one does none of that.

    Args:
        config: sizes; dropout, context parallelism and soft-capping are not supported.
        softmax_scale: default 1 / sqrt(channels of a head).
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("SDPACoreAttention has no context parallelism")
        if config.attention_dropout:
            raise ValueError("SDPACoreAttention has no attention dropout")
        self.layer_number = max(1, layer_number)
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | TextSpans | MaskAndRotation | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [seq, batch, heads, channels].
            key, value: [seq, batch, query groups, channels]; heads is a multiple of the groups.
            attention_mask: TextSpans; or bool, broadcastable to [batch, heads, seq, seq], True where a query must NOT
                look (as everywhere in megatron-core); or the `additive_mask` of one. It takes the place of causality:
                a prefix-LM or block-diagonal mask says all there is to say. None: causal. MaskAndRotation: one of
                these, and queries and keys are turned first.
            options: what megatron-core passes besides; packed sequences and biases are refused.

        Returns:
            [seq, batch, heads * channels], the heads of this rank.
        """
        if options.get("packed_seq_params") is not None or options.get("attention_bias") is not None:
            raise ValueError("SDPACoreAttention supports neither packed_seq_params nor attention_bias; pass a mask")
        if isinstance(attention_mask, MaskAndRotation):
            query, key = map(attention_mask.rotation, (query, key))
            attention_mask = attention_mask.mask
        seq, batch, heads, channels = query.shape
        if isinstance(attention_mask, TextSpans):
            tokens = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
            context = attend_apart(*tokens, attention_mask, scale=self.softmax_scale)
            return context.reshape(batch, seq, heads * channels).transpose(0, 1).contiguous()
        if attention_mask is not None:
            bools = attention_mask.dtype == torch.bool
            attention_mask = ~attention_mask if bools else attention_mask.to(query.dtype)
        # [seq, batch, heads, channels] -> [batch, heads, seq, channels]: views, no copies.
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=heads != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(seq, batch, heads * channels)
