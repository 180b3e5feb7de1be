"""Bytes that a forward pass keeps for the backward pass, and the workspace of head and layers. No torch.

Korthikanti et al. 2022 (section 4), counted anew for this model: RMSNorm, SwiGLU, no dropout, attention that keeps its
output and one number a row instead of the scores, a head that keeps nothing but its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.presets import head_chunk_rows
from pause_megatron.plan.layout import Device, Layout
from pause_megatron.plan.shapes import qkv_width


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    Attributes:
        attention: what the attention half of a layer keeps when it is not recomputed
        feed_forward: what its other half keeps
        angles: cosines and sines (fp32, half of the channels each) that all layers share, if that kernel is fused
        layer_input: the residual stream at one place
        final_norm: what the last norm keeps
        layer_workspace: most that the backward pass of a layer adds to what the layer keeps
        norm_workspace: most that the backward pass of the last norm adds to what it keeps
        head_rows: the rows that reach the head, their gradients, and the states that they are taken from
        head_chunk: most that logits and the weight gradient take while the head works through its chunks
        head_gradient: weight gradient that the head hands to the backward pass
        gather_buffer: megatron-core's buffer for gathered sequences, which lives for good
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
    gather_buffer: int

    @property
    def layer(self) -> int:
        """What a layer keeps when it is not recomputed."""
        return self.attention + self.feed_forward


def activations(layout: Layout, device: Device) -> Activations:
    """Counts a micro-batch.

    Args:
        layout: the run
        device: "cuda" has a fused norm; on a "cpu" torch composes it of fp32 pieces, all of which are kept
    """
    element, tokens, hidden = layout.element, layout.tokens, layout.model.hidden
    residual = tokens * hidden // layout.sequence_split
    inner = tokens * layout.model.ffn // layout.tensor
    gathered = element * tokens * hidden if layout.config.parallel.sequence else 0
    norm = _norm(layout, device, residual)
    norm_and_input = norm + element * residual  # of the linear layer behind it
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
        gather_buffer=gathered,
    )


def _norm(layout: Layout, device: Device, residual: int) -> int:
    """The input and a number a row; composed, the input and the normalised input in fp32."""
    row = 4 * layout.tokens // layout.sequence_split
    return row + (8 * residual if device == "cpu" else layout.element * residual)


def _attention(layout: Layout, device: Device) -> int:
    """Queries, keys, the layer's whole output (values are a view of it), the result, and a number a row and head."""
    model, tokens, tensor = layout.model, layout.tokens, layout.tensor
    queries = tokens * model.hidden // tensor
    keys = queries * model.kv_heads // model.heads
    kept = 2 * queries + keys + tokens * qkv_width(model, tensor)
    rotations = 0 if layout.fused_on(device) else 4 * _angles(layout)  # cosine, sine; queries, keys
    if layout.variable_length:
        if layout.batch.micro_size > 1:
            kept = 3 * queries + 2 * keys  # the three sample by sample, the result in both orders
        elif device == "cpu" or layout.element == 4:
            kept += queries  # results of the spans, and these in one piece
    return layout.element * (kept + rotations) + 4 * tokens * model.heads // tensor


def _angles(layout: Layout) -> int:
    """Tokens x channels of a head: positions are each window's own where its texts do not see each other."""
    windows = layout.batch.micro_size if layout.variable_length else 1
    return windows * layout.batch.sequence_length * (layout.model.hidden // layout.model.heads)


def _head_chunk(layout: Layout, device: Device) -> int:
    """`model/head.py`: a chunk's logits, in both types and with their gradient; the weight gradient, summed in fp32.

    A fused cross-entropy keeps neither the fp32 logits nor their gradient, which takes the place of the logits.
    """
    rows = head_chunk_rows(layout.model.head_chunk, columns=layout.rows, element=layout.element, device=device)
    chunk = min(rows, layout.target_rows)
    chunks = -(-layout.target_rows // chunk)
    logits, matrix = chunk * layout.rows, layout.rows * layout.model.hidden
    if layout.element == 4:
        return 4 * logits + 4 * matrix
    if layout.fused_on(device):
        return (2 if chunks == 1 else 6) * matrix + 2 * logits
    if chunks == 1:
        return max(8 * logits, 4 * logits + 2 * matrix)
    # From the second chunk on there is the fp32 sum, and the gradient of the chunk before is still there when the next
    # logits are made. At the end the sum is rounded.
    return max(4 * matrix + 10 * logits, 6 * matrix + 4 * logits)
