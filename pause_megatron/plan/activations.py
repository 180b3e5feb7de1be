"""Bytes of activations that a forward pass keeps, and the workspace of LM head and layers.

Korthikanti et al. 2022 (section 4), for this model: RMSNorm, SwiGLU, no dropout, attention that keeps its output and
one number a row instead of the scores, an LM head that keeps its gradients only.
"""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.presets import head_chunk_rows
from pause_megatron.plan.attention_work import sliding_layers
from pause_megatron.plan.layout import Device, Layout
from pause_megatron.plan.shapes import copies_queries, gathers_qkv, key_groups, qkv_width


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    Attributes:
        attention: Activations of the attention half of a layer, without recomputation.
        feed_forward: Activations of its feed-forward half.
        angles: Cosines and sines (fp32, half of the channels each) that all layers share, if that kernel is fused.
        layer_input: Residual stream at one place.
        final_norm: Activations of the last norm.
        layer_workspace: Maximum of temporaries in the backward pass of a layer.
        norm_workspace: Maximum of temporaries in the backward pass of the last norm.
        head_rows: Rows that reach the LM head, their gradients, and the hidden states they are gathered from.
        head_chunk: Maximum of logits and weight gradient while the head processes its chunks.
        head_gradient: Weight gradient that the head passes to the backward pass.
        run_buffers: Buffers of the whole run: megatron-core's for gathered sequences, the mask of a sliding window.
    """

    attention: int
    feed_forward: int
    angles: int
    layer_input: int
    final_norm: int
    layer_workspace: int
    norm_workspace: int
    head_rows: int
    head_chunk: int
    head_gradient: int
    run_buffers: int

    @property
    def layer(self) -> int:
        """Activations of a layer, without recomputation."""
        return self.attention + self.feed_forward


def activations(layout: Layout, device: Device) -> Activations:
    """Return the activations of a micro-batch.

    Args:
        layout: A run on its ranks.
        device: "cuda" has a fused norm; on "cpu" torch composes it of fp32 operators, whose inputs are kept.
    """
    element, tokens, hidden = layout.element, layout.tokens, layout.model.hidden
    residual = tokens * hidden // layout.sequence_split
    inner = tokens * layout.model.ffn // layout.tensor
    gathered = element * tokens * hidden if layout.config.parallel.sequence else 0
    norm = _norm(layout, device, residual)
    norm_and_input = norm + element * residual  # input of the linear layer that follows
    rows = 2 * element * layout.target_rows * hidden
    return Activations(
        attention=_attention(layout, device) + norm_and_input,
        # The first matrix's output and the product; in between, the activated gate and the other half plus an offset.
        feed_forward=(3 if layout.fused_on(device) else 5) * element * inner + norm_and_input,
        angles=4 * _angles(layout) if layout.fused_on(device) else 0,
        layer_input=element * residual,
        final_norm=norm,
        layer_workspace=2 * element * inner + 2 * element * residual + gathered,
        norm_workspace=(16 if device == "cpu" else 2 * element) * residual + element * residual,
        head_rows=rows + element * residual + gathered + 4 * layout.target_rows,
        head_chunk=_head_chunk(layout, device),
        head_gradient=element * layout.rows * hidden,
        run_buffers=gathered + _window_mask(layout, device),
    )


def _norm(layout: Layout, device: Device, residual: int) -> int:
    """Return what a norm keeps: its input and one number per row; composed, input and normalized input in fp32."""
    row = 4 * layout.tokens // layout.sequence_split
    return row + (8 * residual if device == "cpu" else layout.element * residual)


def _attention(layout: Layout, device: Device) -> int:
    """Return what attention keeps: queries, keys, the qkv output (with the values), the result, and row sums."""
    model, tokens, tensor = layout.model, layout.tokens, layout.tensor
    queries = tokens * model.query_width // tensor
    keys = tokens * key_groups(model, tensor) * model.channels
    # Values are a view of linear_qkv's output, which therefore stays whole, also where ranks gather it.
    qkv = tokens * qkv_width(model, tensor) * (tensor if gathers_qkv(model, tensor) else 1)
    kept = 2 * queries + keys + qkv
    # Queries, keys and values packed, the result in both layouts; the output only for norms of its heads.
    packed = 3 * queries + 2 * keys + (qkv if model.qk_norm == "head" and device == "cuda" else 0)
    rotations = 0 if layout.fused_on(device) else 4 * _angles(layout)  # cosine, sine; queries, keys
    if layout.variable_length:
        if layout.batch.micro_size > 1:
            kept = packed
        elif device == "cpu" or layout.element == 4:
            kept += queries  # results of the sequences, and their concatenation
    elif device == "cuda" and layout.element < 4 and layout.batch.micro_size > 1:
        kept += (packed - kept) * sliding_layers(layout) // model.depth
    return layout.element * (kept + rotations) + 4 * tokens * model.heads // tensor + _qk_norms(layout, device)


def _qk_norms(layout: Layout, device: Device) -> int:
    """Return what the norms of queries and keys keep, as `_norm`; of a view of linear_qkv's output not the input."""
    model, tokens, tensor = layout.model, layout.tokens, layout.tensor
    if model.qk_norm is None:
        return 0
    groups = key_groups(model, tensor)
    queries, both = tokens * model.query_width // tensor, tokens * (model.heads // tensor + groups)
    whole = model.qk_norm == "whole"
    rows = 4 * (2 * tokens if whole else both)
    if device == "cpu" or (whole and tensor > 1):  # composed
        return 8 * both * model.channels + rows
    return rows + layout.element * (both * model.channels if whole else queries * copies_queries(model, tensor))


def _window_mask(layout: Layout, device: Device) -> int:
    """Return the bytes of the mask of a sliding window, which all layers share; a kernel in 16 bits needs none."""
    has_kernel = device == "cuda" and layout.element < 4
    return 0 if has_kernel or not sliding_layers(layout) else layout.element * layout.batch.sequence_length**2


def _angles(layout: Layout) -> int:
    """Return tokens x channels of a head, for each window where windows have their own positions."""
    windows = layout.batch.micro_size if layout.has_positions else 1
    return windows * layout.batch.sequence_length * layout.model.channels


def _head_chunk(layout: Layout, device: Device) -> int:
    """Return the maximum while `model/head.py` processes a chunk: logits, their gradient, the fp32 weight gradient.

    A fused cross-entropy has no fp32 logits, and writes their gradient in place. An objective adds softmaxes in fp32 to
    an fp32 gradient. What one of the user derives from the chunk is not in it.
    """
    rows = head_chunk_rows(layout.model.head_chunk, columns=layout.rows, element=layout.element, device=device)
    chunk = min(rows, layout.target_rows)
    chunks = -(-layout.target_rows // chunk)
    logits, matrix = chunk * layout.rows, layout.rows * layout.model.hidden
    if layout.has_objective:
        others = 4 * matrix if chunks > 1 else 0  # gradient of the chunks before
        if layout.element == 4:
            return max(12 * logits + others, 8 * logits + 4 * matrix)
        return max(14 * logits + others, 4 * logits + (6 if chunks > 1 else 2) * matrix)
    if layout.element == 4:
        return 4 * logits + 4 * matrix
    if layout.fused_on(device):
        return (2 if chunks == 1 else 6) * matrix + 2 * logits
    if chunks == 1:
        return max(8 * logits, 4 * logits + 2 * matrix)
    # From the second chunk on, the fp32 sum exists, and the last chunk's gradient while the next logits are computed.
    # At the end the sum is rounded.
    return max(4 * matrix + 10 * logits, 6 * matrix + 4 * logits)
