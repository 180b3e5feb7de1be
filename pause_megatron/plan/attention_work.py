"""Work of the attention of a layer between its two linear layers."""

from __future__ import annotations

from pause_megatron.plan.kernel_work import Work
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.shapes import copies_queries, gathers_qkv, key_groups, qkv_width


def attention_work(layout: Layout, layer: int) -> tuple[Work, Work]:
    """Return the work of a layer's attention, forward and backward, without its linear layers.

    Args:
        layout: A run on its ranks.
        layer: Number of the layer.
    """
    scores = _scores(layout, layer) * layout.model.query_width // layout.tensor
    forward, backward = Work(attention=4 * scores, kernels=0), Work(attention=10 * scores, kernels=0)
    for piece in (_split(layout), _norms(layout), _rotation(layout), _copies(layout, layer)):
        forward, backward = forward + piece[0], backward + piece[1]
    return forward, backward


def _queries(layout: Layout) -> int:
    """Return the bytes of this rank's queries."""
    return layout.element * layout.tokens * layout.model.query_width // layout.tensor


def _keys(layout: Layout) -> int:
    """Return the bytes of the keys that this rank computes with."""
    return layout.element * layout.tokens * key_groups(layout.model, layout.tensor) * layout.model.channels


def _split(layout: Layout) -> tuple[Work, Work]:
    """Return the work of splitting linear_qkv's output; backward the gradients of its parts are concatenated.

    Where ranks share key/value heads, they gather the output, and each takes its query group and in that its queries.
    """
    model, ranks = layout.model, layout.tensor
    column = layout.element * layout.tokens
    forward = Work(bytes=2 * _queries(layout), kernels=1) if copies_queries(model, ranks) else Work()
    if not gathers_qkv(model, ranks):
        return forward, Work(bytes=2 * column * qkv_width(model, ranks), kernels=1)
    whole = column * ranks * qkv_width(model, ranks)
    group, of_group = whole // model.kv_heads, column * model.query_width // model.kv_heads
    sliced = whole + group + of_group + _queries(layout)  # gradients of slices, with zeros around them
    return forward + Work(bytes=2 * whole, kernels=1), Work(bytes=2 * whole + 2 * group + sliced, kernels=1 + 1 + 2)


def _norms(layout: Layout) -> tuple[Work, Work]:
    """Return the work of the norms of queries and keys; those that lie among others are copied first."""
    model, ranks = layout.model, layout.tensor
    forward = backward = Work()
    if model.qk_norm is None:
        return forward, backward
    whole, groups = model.qk_norm == "whole", key_groups(model, ranks)
    for size, heads, is_copy in (
        (_queries(layout), model.heads // ranks, copies_queries(model, ranks)),
        (_keys(layout), groups, False),
    ):
        if whole and ranks > 1:
            one, other = _norm_over_ranks(layout, size)
        else:
            rows = 4 * layout.tokens * (1 if whole else heads)
            weight = layout.element * model.channels * (heads if whole else 1)
            one = Work(bytes=2 * size + rows + weight, kernels=1)
            other = Work(bytes=5 * size + 2 * rows + 2 * weight, kernels=2)
            copy = Work(bytes=2 * size, kernels=1)
            if not is_copy:
                one += copy
                # Heads that are brought side by side stay so, others are copied in both passes.
                other += copy if not whole or groups == 1 else Work()
        forward, backward = forward + one, backward + other
    return forward, backward


def _norm_over_ranks(layout: Layout, size: int) -> tuple[Work, Work]:
    """Return the work of a norm over the heads of all ranks, which torch composes of operators in fp32.

    Args:
        layout: A run on its ranks.
        size: Bytes of queries or keys of this rank.
    """
    numel, half = size // layout.element, layout.element < 4
    converted = 2 * (4 + layout.element) * numel if half else 0
    # Forward squares, sums and two products; backward their gradients.
    return (
        Work(bytes=converted + 28 * numel, kernels=7 + 2 * half),
        Work(bytes=converted + 84 * numel, kernels=15 + 3 * half),
    )


def has_window(layout: Layout, layer: int) -> bool:
    """Return whether a layer's sliding window is shorter than the window that is read.

    Args:
        layout: A run on its ranks.
        layer: Number of the layer.
    """
    return (layout.model.window_of(layer) or layout.batch.sequence_length) < layout.batch.sequence_length


def sliding_layers(layout: Layout) -> int:
    """Return how many layers of a forward pass have such a window.

    Args:
        layout: A run on its ranks.
    """
    return sum(has_window(layout, layer) for layer in layout.model.order)


def _copies(layout: Layout, layer: int) -> tuple[Work, Work]:
    """Return the copies that bring tensors into the layout of the attention core.

    A sliding window takes the core of variable length, whose segments are then the windows.
    """
    sliding = has_window(layout, layer) and layout.element < 4
    if not layout.variable_length and not sliding:
        return Work(), Work()
    bounds = Work(kernels=int(not layout.variable_length))
    if layout.batch.micro_size == 1:  # sequence-first is batch-first
        return bounds + Work(kernels=1), Work(kernels=1)
    queries, keys = _queries(layout), _keys(layout)
    return bounds + Work(bytes=4 * (queries + keys), kernels=5), Work(bytes=2 * queries, kernels=2)


def _scores(layout: Layout, layer: int) -> int:
    """Return the pairs of tokens that attention computes: half of the square of the window, less before a sliding one.

    In fp32 a sliding window is a mask, which spares nothing.
    """
    length = layout.batch.sequence_length
    if not has_window(layout, layer):
        return layout.tokens * length // 2
    window = layout.model.window_of(layer) or length
    return layout.batch.micro_size * (window * (2 * length - window) // 2 if layout.element < 4 else length**2)


def _rotation(layout: Layout) -> tuple[Work, Work]:
    """Return the work of the rotary embedding of queries and keys, forward and backward."""
    model, element = layout.model, layout.element
    both = _queries(layout) + _keys(layout)
    windows = layout.batch.micro_size if layout.has_positions else 1
    angles = element * layout.batch.sequence_length * model.channels * windows
    if layout.fused:
        return Work(bytes=2 * both + 4 * angles, kernels=2), Work(bytes=2 * both + 4 * angles, kernels=2)
    # Half of a tensor rotated, concatenated, two products, their sum, a copy; cosine and sine in fp32.
    return Work(bytes=12 * both + 48 * angles, kernels=24), Work(bytes=14 * both + 4 * angles, kernels=14)
