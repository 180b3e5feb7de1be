"""Reductions of a backward pass over the data-parallel ranks, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pause_megatron.config.lora import LORA_A, LORA_B
from pause_megatron.plan.activations import Activations
from pause_megatron.plan.layout import Layout

# Gradients in the order of a layer's backward pass, with the halves of the layer whose activations are still kept.
_BACKWARD = (
    ("mlp.linear_fc2.post_layernorm.weight", "both"),
    ("mlp.linear_fc2.bias", "both"),
    ("mlp.linear_fc2.weight", "both"),
    ("mlp.linear_fc1.bias", "attention"),
    ("mlp.linear_fc1.weight", "attention"),
    ("pre_mlp_layernorm.weight", "attention"),
    ("self_attention.linear_proj.post_layernorm.weight", "attention"),
    ("self_attention.linear_proj.bias", "attention"),
    ("self_attention.linear_proj.weight", "attention"),
    ("self_attention.q_layernorm.weight", "none"),
    ("self_attention.k_layernorm.weight", "none"),
    ("self_attention.linear_qkv.weight", "none"),
    ("self_attention.linear_qkv.bias", "none"),
    ("input_layernorm.weight", "none"),
)


@dataclass(frozen=True)
class Reduction:
    """A bucket of gradients when it is reduced.

    Attributes:
        numel: Elements of the bucket.
        oversized: Whether it is one gradient larger than a bucket, reduced in place.
        done: Elements of this gradient and of all before it.
        activation_bytes: Activations that earlier layers still keep.
    """

    numel: int
    oversized: bool
    done: int
    activation_bytes: int


def reductions(layout: Layout, kept: Activations, bucket: int) -> list[Reduction]:
    """Return the reductions of a backward pass in order; a bucket is reduced when the next gradient does not fit.

    Args:
        layout: A run on its ranks.
        kept: Activations of a micro-batch.
        bucket: Elements of a bucket.
    """
    buckets: list[Reduction] = []
    filled = done = 0
    for numel, left in _gradients(layout, kept):
        if filled and filled + numel > bucket:
            buckets.append(Reduction(filled, filled > bucket, done, left))
            filled = 0
        filled += numel
        done += numel
    return [*buckets, Reduction(filled, filled > bucket, done, 0)]


def _gradients(layout: Layout, kept: Activations) -> Iterator[tuple[int, int]]:
    """Yield elements of each gradient in the order of the backward pass, and the activations that still exist.

    The gradient of a looped layer is complete at the end of its first run, when later loops keep nothing.
    """
    numels = {p.name: p.numel for p in layout.parameters}
    for name in [name for name in numels if name.endswith((LORA_A, LORA_B))]:
        numels[f"{name.rpartition('.')[0]}.weight"] += numels.pop(name)  # a moment apart
    layer = kept.layer_input if layout.recompute else kept.layer
    halves = {"both": kept.layer, "attention": kept.attention, "none": 0}
    if not layout.model.tied:
        yield numels["output_layer.weight"], layout.model.depth * layer + kept.final_norm
    yield numels["decoder.final_layernorm.weight"], layout.model.depth * layer
    for index in reversed(range(layout.model.layers)):
        for name, left in _BACKWARD:
            numel = numels.get(f"decoder.layers.{index}.{name}")
            if numel is not None:
                yield numel, layout.model.order.index(index) * layer + halves[left]
    yield numels["embedding.word_embeddings.weight"], 0
