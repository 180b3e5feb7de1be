"""Variable-length attention: intra-document masking by the lengths of the segments, without a mask.

It computes what `segment_mask` describes with N^2 booleans a window. The cost is the sum of the squares of the lengths.
On a GPU it is one call of torch's variable-length flash kernel; elsewhere (on a CPU, in fp32) it is one call of
`scaled_dot_product_attention` a segment. For segments of 4 tokens in windows of 512 a mask would be 1.3 times faster on
a CPU. Documents are longer than that, so there is no second path.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pause_megatron.distributed.transfer import to_device
from pause_megatron.model.window import SlidingWindow


@dataclass(frozen=True)
class SegmentLengths:
    """Consecutive segments of [tokens].

    Attributes:
        lengths: Tokens of each segment, each at least 1. They are on the host, where they are shapes; reading them from
            a device would synchronize.
        cu_seqlens: Cumulative lengths, int32 [segments + 1] from 0 on, on the device of the queries.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str) -> SegmentLengths:
        """Make the lengths of segments.

        Args:
            lengths: int64 [segments], on the host.
            device: Device of the queries.
        """
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(tuple(lengths.tolist()), to_device(cu_seqlens, device))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)


@dataclass(frozen=True)
class PackedSegments:
    """The segments of a micro-batch. Tokens attend within their segment, causally except within its prefix.

    It takes the place of an attention mask. Tokens are flattened sample by sample: sample * seq + position.

    Attributes:
        segments: Segments of all tokens of the micro-batch; padding makes segments of its own.
        prefix_rows: Tokens of all prefixes, int64 [prefix tokens], ascending; None: causal.
        prefixes: Lengths of the prefixes; a segment without a prefix has none here.
    """

    segments: SegmentLengths
    prefix_rows: Tensor | None = None
    prefixes: SegmentLengths | None = None

    @classmethod
    def of(
        cls, segments: Tensor, prefix: Tensor | None = None, *, device: torch.device | str = "cpu"
    ) -> PackedSegments:
        """Make them from segment numbers and prefixes as in `segment_mask`, both on the host.

        Args:
            segments: Segment numbers, int [batch, seq]. A segment is one run of equal numbers; padding is -1.
            prefix: Leading tokens of segments, which attend to each other, bool [batch, seq]; None: causal.
            device: Device of the queries.

        Raises:
            ValueError: Marked tokens are not the first of their segment.
        """
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        begins = begins.flatten()
        starts = begins.nonzero().squeeze(1)
        packed = SegmentLengths.of(starts.diff(append=starts.new_tensor([begins.numel()])), device)
        if prefix is None or not prefix.any():
            return cls(packed)
        marked, segment = prefix.flatten(), begins.cumsum(0) - 1
        lengths = torch.bincount(segment[marked], minlength=starts.numel())
        leading = torch.arange(marked.numel()) - starts[segment] < lengths[segment]
        if not torch.equal(leading, marked):
            sample, position = divmod(int((leading != marked).nonzero()[0]), segments.shape[1])
            raise ValueError(
                f"prefix: expected marks on the first tokens of each segment only, got another mark in sample {sample} "
                f"at position {position}; use segment_mask for such a mask"
            )
        rows = to_device(marked.nonzero().squeeze(1), device)
        return cls(packed, rows, SegmentLengths.of(lengths[lengths > 0], device))

    @classmethod
    def whole(cls, batch: int, seq: int, device: torch.device) -> PackedSegments:
        """Make each sample one segment.

        Args:
            batch: Samples.
            seq: Tokens of a sample.
            device: Device of the queries.
        """
        cu_seqlens = torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32, device=device)
        return cls(SegmentLengths((seq,) * batch, cu_seqlens))


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSegments,
    *,
    scale: float,
    window: SlidingWindow | None = None,
) -> Tensor:
    """Compute softmax attention within segments, causal except within their prefixes.

    Args:
        query: [batch * seq, heads, channels], sample by sample.
        key: [batch * seq, query groups, channels].
        value: [batch * seq, query groups, channels].
        packed: The segments.
        scale: Factor of the scores.
        window: Sliding window of the causal part; a prefix is attended to as a whole by its own tokens.

    Returns:
        [batch * seq, heads, channels].
    """
    context = varlen_attention(query, key, value, packed.segments, causal=True, scale=scale, window=window)
    if packed.prefix_rows is None or packed.prefixes is None:
        return context
    # Causal attention is right for all tokens but those of a prefix, which are computed again over the whole prefix.
    rows = packed.prefix_rows
    query, key, value = (tensor.index_select(0, rows) for tensor in (query, key, value))
    inner = varlen_attention(query, key, value, packed.prefixes, causal=False, scale=scale)
    return context.index_copy(0, rows, inner)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: SegmentLengths,
    *,
    causal: bool,
    scale: float,
    window: SlidingWindow | None = None,
) -> Tensor:
    """Compute softmax attention within each segment.

    Args:
        query: [tokens, heads, channels].
        key: [tokens, query groups, channels].
        value: [tokens, query groups, channels].
        lengths: The segments.
        causal: Whether a token attends to no later one.
        scale: Factor of the scores.
        window: Sliding window; only with causal.

    Returns:
        [tokens, heads, channels].
    """
    if has_variable_length_kernel(query, key):
        return varlen_kernel_attention(query, key, value, lengths, causal=causal, scale=scale, window=window)
    # split and cat, not slices: the gradient of a slice is a tensor as long as the whole.
    queries, keys, values = (tensor.split(lengths.lengths) for tensor in (query, key, value))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_one_segment(q, k, v, causal=causal, scale=scale, window=window) for q, k, v in parts])


def _one_segment(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, window: SlidingWindow | None
) -> Tensor:
    mask = None
    if window is not None and window.size < query.shape[0]:
        mask = window.causal(query.shape[0], query.dtype, query.device)
    # [tokens, heads, channels] -> [1, heads, tokens, channels]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context[0].transpose(0, 1)


def has_variable_length_kernel(query: Tensor, key: Tensor) -> bool:
    """Return whether torch's variable-length kernel supports these queries and keys.

    It needs an NVIDIA GPU from Ampere on, 16-bit floats, and heads of at most 256 channels, a multiple of 8. For
    grouped queries it needs torch 2.12 or newer.

    Args:
        query: [tokens, heads, channels].
        key: [tokens, query groups, channels].
    """
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    if not takes_call(_kernel_parameters(), grouped=query.shape[1] != key.shape[1]):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and query.shape[2] in range(8, 257, 8)


def takes_call(parameters: Iterable[str], *, grouped: bool) -> bool:
    """Return whether a `varlen_attn` with these parameters takes the call of `varlen_kernel_attention`.

    Args:
        parameters: Names of its parameters; torch 2.10 has no scale, 2.11 no grouped queries.
        grouped: Whether there are fewer query groups than heads.
    """
    return {"scale", "window_size", *(["enable_gqa"] if grouped else [])} <= set(parameters)


@functools.cache
def _kernel_parameters() -> tuple[str, ...]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


def varlen_kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: SegmentLengths,
    *,
    causal: bool,
    scale: float,
    window: SlidingWindow | None = None,
) -> Tensor:
    """Compute `varlen_attention` in one kernel (torch.nn.attention.varlen).

    Args:
        query: [tokens, heads, channels].
        key: [tokens, query groups, channels].
        value: [tokens, query groups, channels].
        lengths: The segments.
        causal: Whether a token attends to no later one.
        scale: Factor of the scores.
        window: Sliding window; only with causal.

    Returns:
        [tokens, heads, channels].
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    context = varlen_attn(
        query,
        key,
        value,
        lengths.cu_seqlens,
        lengths.cu_seqlens,
        lengths.max_seqlen,
        lengths.max_seqlen,
        scale=scale,
        window_size=(-1 if window is None else window.size - 1, 0 if causal else -1),
        **grouped,
    )
    return context if isinstance(context, Tensor) else context[0]  # a tuple where auxiliary outputs are asked for
