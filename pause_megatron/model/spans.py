"""Attention within spans of tokens that stand one behind the other: no mask, no scores between spans.

What `segment_mask` says with N^2 booleans a window, said with the lengths of the texts. The work is the sum of the
squares of the lengths. On a GPU it is one call of torch's variable-length flash kernel; elsewhere (a CPU, fp32) it is
one call of `scaled_dot_product_attention` a span. For spans of 4 tokens in windows of 512 a mask would be faster (1.3
times on a CPU); texts are longer than that, so there is one way only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pause_megatron.distributed.transfer import to_device


@dataclass(frozen=True)
class Spans:
    """Consecutive tokens [tokens], cut into spans.

    Attributes:
        lengths: tokens of each span, none of them empty. On the host: they are shapes, and reading them from a device
            would wait for it.
        bounds: int32 [spans + 1], where each begins and the last ends, on the device of the queries.
    """

    lengths: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str) -> Spans:
        """From lengths int64 [spans] on the host."""
        bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(tuple(lengths.tolist()), to_device(bounds, device))

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return max(self.lengths)


@dataclass(frozen=True)
class TextSpans:
    """The texts of a micro-batch, window after window: each sees itself only, causally but for its prefix.

    Takes the place of an attention mask. Tokens are numbered sample by sample: sample * seq + position.

    Attributes:
        texts: all tokens of the micro-batch; padding makes spans of its own.
        prefix_rows: int64 [prefix tokens], ascending: the tokens of all prefixes; None: causal.
        prefixes: their spans; a text without a prefix has none.
    """

    texts: Spans
    prefix_rows: Tensor | None = None
    prefixes: Spans | None = None

    @classmethod
    def of(cls, segments: Tensor, prefix: Tensor | None = None, *, device: torch.device | str = "cpu") -> TextSpans:
        """From segments and prefixes as in `segment_mask`, both on the host.

        Args:
            segments: int [batch, seq]; each text is one run of equal numbers. Padding is -1.
            prefix: bool [batch, seq], the first tokens of texts, those that see each other; None: causal.
            device: of the queries.

        Raises:
            ValueError: marked tokens are not the first of their text.
        """
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        begins = begins.flatten()
        starts = begins.nonzero().squeeze(1)
        texts = Spans.of(starts.diff(append=starts.new_tensor([begins.numel()])), device)
        if prefix is None or not prefix.any():
            return cls(texts)
        marked, text = prefix.flatten(), begins.cumsum(0) - 1
        lengths = torch.bincount(text[marked], minlength=starts.numel())
        leading = torch.arange(marked.numel()) - starts[text] < lengths[text]
        if not torch.equal(leading, marked):
            sample, position = divmod(int((leading != marked).nonzero()[0]), segments.shape[1])
            raise ValueError(
                f"prefix: expected marks on the first tokens of each text only, got another mark in sample {sample} at "
                f"position {position}; use segment_mask for such a mask"
            )
        rows = to_device(marked.nonzero().squeeze(1), device)
        return cls(texts, rows, Spans.of(lengths[lengths > 0], device))


def attend_apart(query: Tensor, key: Tensor, value: Tensor, spans: TextSpans, *, scale: float) -> Tensor:
    """Softmax attention of texts that do not see each other.

    Args:
        query: [batch * seq, heads, channels], sample by sample.
        key, value: [batch * seq, query groups, channels].
        spans: the texts.
        scale: what scores are multiplied with.

    Returns:
        [batch * seq, heads, channels].
    """
    context = attend(query, key, value, spans.texts, causal=True, scale=scale)
    if spans.prefix_rows is None:
        return context
    # A token behind the prefix sees what it sees causally. Those of the prefix are computed again: they see it whole.
    rows = spans.prefix_rows
    inner = (tensor.index_select(0, rows) for tensor in (query, key, value))
    return context.index_copy(0, rows, attend(*inner, spans.prefixes, causal=False, scale=scale))


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, causal: bool, scale: float) -> Tensor:
    """Softmax attention within each span: arguments and result as `attend_apart`."""
    if has_variable_length_kernel(query, key):
        return attend_by_kernel(query, key, value, spans, causal=causal, scale=scale)
    parts = zip(*(tensor.split(spans.lengths) for tensor in (query, key, value)), strict=True)
    # split and cat, not slices: the gradient of a slice is a tensor as long as the whole.
    return torch.cat([_attend_one(*part, causal=causal, scale=scale) for part in parts])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    context = F.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),  # [1, heads, span, channels]
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context[0].transpose(0, 1)


def has_variable_length_kernel(query: Tensor, key: Tensor) -> bool:
    """Whether torch's variable-length attention takes queries and keys [tokens, heads or groups, channels].

    It wants an NVIDIA GPU from Ampere on, 16-bit numbers, and heads of at most 256 channels, a multiple of 8; for
    fewer groups than heads, torch 2.12 or newer.
    """
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    if not takes_call(_kernel_parameters(), grouped=query.shape[1] != key.shape[1]):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and query.shape[2] in range(8, 257, 8)


def takes_call(parameters: Iterable[str], *, grouped: bool) -> bool:
    """Whether a `varlen_attn` with these parameters takes the call of `attend_by_kernel`.

    Args:
        parameters: their names; torch 2.10 has no scale, 2.11 no grouped queries.
        grouped: whether there are fewer groups than heads.
    """
    return {"scale", "window_size", *(["enable_gqa"] if grouped else [])} <= set(parameters)


@functools.cache
def _kernel_parameters() -> tuple[str, ...]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


def attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, causal: bool, scale: float) -> Tensor:
    """`attend`, in one kernel (torch.nn.attention.varlen)."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return varlen_attn(
        query,
        key,
        value,
        spans.bounds,
        spans.bounds,
        spans.longest,
        spans.longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **grouped,
    )
