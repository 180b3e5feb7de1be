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

from pause_megatron.model.variable_length import (
    PackedSegments,
    has_variable_length_kernel,
    segment_attention,
)
from pause_megatron.model.window import SlidingWindow


def segment_mask(segments: Tensor, prefix: Tensor | None = None, window: int | None = None) -> Tensor:
    """Return the attention mask of windows with several segments: intra-document, causal except within a prefix.

    Token i attends to token j if both are in the same segment, and j <= i or both are in the segment's prefix. Padding
    is segment -1: it attends to padding (so that no softmax is empty), and no other token attends to it. A sliding
    window narrows j <= i to i - window < j <= i and leaves prefixes whole, as `or_mask_function` in transformers.

    Args:
        segments: Segment numbers, int [batch, seq].
        prefix: Tokens of prefixes, bool [batch, seq]; None: causal.
        window: Tokens of the sliding window; None: none.

    Returns:
        bool [batch, 1, seq, seq], True where a query must not attend, as in megatron-core. `PackedSegments` describes
        the same mask without N^2 booleans. This is its definition, and supports prefixes that are not leading.
    """
    seq = segments.shape[1]
    attended = torch.ones(seq, seq, dtype=torch.bool, device=segments.device).tril_()
    if window is not None:
        attended = attended.triu_(1 - window)
    if prefix is not None:
        attended = attended | (prefix[:, :, None] & prefix[:, None, :])
    return ~(attended & (segments[:, :, None] == segments[:, None, :]))[:, None]


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of a boolean one, of the same shape: 0, or -inf where it is True.

    torch's kernels use a mask in the dtype of the queries. They would convert a boolean mask in every layer and keep
    each copy for the backward pass.

    Args:
        hidden: bool of any shape, True where a query must not attend.
        dtype: Type of the queries.
    """
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of a micro-batch, computed once for all layers.

    Attributes:
        cos: Cosines, fp32 [seq, 1 or batch, channels / 2].
        sin: Sines, fp32 [seq, 1 or batch, channels / 2].
        rotate: As `pause_megatron.model.kernels.Kernels.rotate`.
    """

    cos: Tensor
    sin: Tensor
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, angles: Tensor, rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rotation:
        """Make it from megatron-core's angles.

        Args:
            angles: [seq, 1 or batch, 1, channels]; the second half of the channels repeats the first.
            rotate: As `pause_megatron.model.kernels.Kernels.rotate`.
        """
        half = angles[:, :, 0, : angles.shape[-1] // 2].float()
        return cls(half.cos().contiguous(), half.sin().contiguous(), rotate)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [seq, batch, heads, channels]."""
        return self.rotate(x, self.cos, self.sin)


@dataclass(frozen=True)
class MaskAndRotation:
    """An attention mask with the rotation of queries and keys, where the core attention applies the rotation.

    Attributes:
        mask: As in `SDPACoreAttention.forward`.
        rotation: Rotary embedding of queries and keys.
    """

    mask: Tensor | PackedSegments | None
    rotation: Rotation


class SDPACoreAttention(MegatronModule):
    """Softmax attention of this rank's heads: causal, variable-length, or with a mask.

    megatron-core's local core attention needs CUDA (mask buffers, a random-number fork), materializes the scores, and
    repeats keys and values for grouped queries. This one does not.

    Args:
        config: Sizes; dropout, context parallelism and soft-capping are not supported.
        layer_number: Number of the layer, from 1 on.
        softmax_scale: Factor of the scores; default: 1 / sqrt(channels of a head).
        window: Sliding window; None: none. Layers share one, and with it their mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        window: SlidingWindow | None = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError(f"SDPACoreAttention: expected context_parallel_size 1, got {config.context_parallel_size}")
        if config.attention_dropout:
            raise ValueError(f"SDPACoreAttention: expected attention_dropout 0, got {config.attention_dropout}")
        self.layer_number = max(1, layer_number)
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.window = window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | PackedSegments | MaskAndRotation | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: [seq, batch, heads, channels].
            key: [seq, batch, query groups, channels]; heads is a multiple of the groups.
            value: [seq, batch, query groups, channels].
            attention_mask: PackedSegments; or bool, broadcastable to [batch, heads, seq, seq], True where a query must
                NOT attend (as in megatron-core); or the `additive_mask` of one. A mask replaces the causal one, so a
                prefix-LM or block-diagonal mask is complete; a sliding window also hides the tokens before it, within a
                prefix too. None: causal. MaskAndRotation: one of these, after queries and keys are rotated.
            **options: Further arguments of megatron-core's; packed sequences and biases are errors.

        Returns:
            [seq, batch, heads * channels], the heads of this rank.
        """
        if options.get("packed_seq_params") is not None or options.get("attention_bias") is not None:
            raise ValueError(
                "SDPACoreAttention: expected no packed_seq_params and no attention_bias, got one; use a mask"
            )
        if isinstance(attention_mask, MaskAndRotation):
            query, key = map(attention_mask.rotation, (query, key))
            attention_mask = attention_mask.mask
        seq, batch, heads, channels = query.shape
        window = self.window if self.window is not None and self.window.size < seq else None
        if window is not None and attention_mask is None and has_variable_length_kernel(query[:, 0], key[:, 0]):
            attention_mask = PackedSegments.whole(batch, seq, query.device)  # the kernel needs no mask
        if isinstance(attention_mask, PackedSegments):
            query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
            context = segment_attention(query, key, value, attention_mask, scale=self.softmax_scale, window=window)
            return context.reshape(batch, seq, heads * channels).transpose(0, 1).contiguous()
        if window is not None:
            attention_mask = (
                window.causal(seq, query.dtype, query.device)
                if attention_mask is None
                else window.within(attention_mask)
            )
        if attention_mask is not None:
            boolean = attention_mask.dtype == torch.bool
            attention_mask = ~attention_mask if boolean else attention_mask.to(query.dtype)
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
