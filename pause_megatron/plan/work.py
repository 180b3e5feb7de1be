"""Work of a GPU in a step: FLOPs of matrix products and attention, bytes of other kernels, kernel launches.

Matrix products and attention are compute-bound. All other kernels are memory-bound: they read each input once and write
each output once. A test compares these formulas with the real model on fake CUDA tensors (`tests/support/counting.py`).
The bytes of accumulation and optimizer are those of DeepSpeed's operators.
"""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.presets import head_chunk_rows
from pause_megatron.plan.attention_work import attention_work
from pause_megatron.plan.kernel_work import Work
from pause_megatron.plan.layout import FALLBACK_BUCKET, Layout
from pause_megatron.plan.shapes import qkv_width


@dataclass(frozen=True)
class StepWork:
    """Work of an optimizer step on one GPU, by part of the model.

    Attributes:
        layers: Forward and backward pass of all layers, with recomputation, for one micro-batch.
        head: LM head, for one micro-batch.
        ends: Embedding and last norm, for one micro-batch.
        gradients: DeepSpeed's operations on the gradients of all micro-batches.
        update: Gradient norm, AdamW, new bf16 weights.
        micro_batches: Micro-batches of a step.
    """

    layers: Work
    head: Work
    ends: Work
    gradients: Work
    update: Work
    micro_batches: int

    @property
    def micro_batch(self) -> Work:
        """Work of forward and backward pass of one micro-batch."""
        return self.layers + self.head + self.ends


def step_work(layout: Layout) -> StepWork:
    """Return the work of an optimizer step.

    Args:
        layout: A run on its ranks.
    """
    layers = Work()
    for layer in layout.model.order:
        forward, backward = layer_work(layout, layer)
        layers += forward + backward + (forward if layout.recompute else Work())
    return StepWork(
        layers=layers,
        head=head_work(layout),
        ends=_ends(layout),
        gradients=_gradients(layout),
        update=_update(layout),
        micro_batches=layout.batch.accumulation,
    )


def layer_work(layout: Layout, layer: int = 0) -> tuple[Work, Work]:
    """Return the work of one layer's forward pass and of its backward pass.

    Args:
        layout: A run on its ranks.
        layer: Its number; layers differ where only some have a sliding window.
    """
    model, element = layout.model, layout.element
    tokens, tensor = layout.tokens, layout.tensor
    residual = element * tokens * model.hidden // layout.sequence_split
    rows = 4 * tokens // layout.sequence_split  # one fp32 number a row that a norm keeps
    weight = element * model.hidden
    matrices = model.hidden * (qkv_width(model, tensor) + model.query_width // tensor + 3 * model.ffn // tensor)
    products = 2 * tokens * matrices
    # Two halves, each with a norm and an addition to the residual stream.
    forward = Work(products, 0, 2 * (2 * residual + rows + weight) + 6 * residual, 4 + 1 + 2 + 2)
    norms = 2 * (5 * residual + 2 * rows + 2 * weight)
    backward = Work(2 * products, 0, norms + 6 * residual, 8 + 3 + 4 + 2)
    for piece in (attention_work(layout, layer), _swiglu(layout), _biases(layout, residual)):
        forward, backward = forward + piece[0], backward + piece[1]
    # Gradients of which each rank has a part are copied to be summed over the ranks.
    summed = [p.numel for p in layout.parameters if _is_of(p.name, layer) and layout.sums_gradient(p)]
    backward += Work(bytes=2 * element * sum(summed), kernels=len(summed))
    return forward, backward


def _is_of(name: str, layer: int) -> bool:
    return name.startswith(f"decoder.layers.{layer}.")


def _biases(layout: Layout, residual: int) -> tuple[Work, Work]:
    """Return the work of biases: each is added to an output, and its gradient is the sum over the output's rows."""
    model, element, tensor = layout.model, layout.element, layout.tensor
    widths = {  # of an output, and its bytes
        "qkv": (qkv_width(model, tensor), model.qkv_bias, None),
        "proj": (model.hidden, model.proj_bias, residual),
        "fc1": (2 * model.ffn // tensor, model.mlp_bias, None),
        "fc2": (model.hidden, model.mlp_bias, residual),
    }
    forward = backward = Work()
    for width, is_there, size in widths.values():
        if is_there:
            output = element * layout.tokens * width if size is None else size
            forward += Work(bytes=2 * output + element * width, kernels=1)
            backward += Work(bytes=output + element * width, kernels=1)
    return forward, backward


def _swiglu(layout: Layout) -> tuple[Work, Work]:
    """Return the work of SwiGLU, forward and backward."""
    inner = layout.element * layout.tokens * layout.model.ffn // layout.tensor
    if layout.fused:
        return Work(bytes=3 * inner, kernels=1), Work(bytes=5 * inner, kernels=1)
    # megatron-core adds an offset of 0 to the half that is not activated.
    return Work(bytes=7 * inner, kernels=3), Work(bytes=13 * inner, kernels=4)


def head_work(layout: Layout) -> Work:
    """Return the work of the LM head, forward and backward, a chunk of rows at a time.

    Args:
        layout: A run on its ranks.
    """
    element, hidden, columns = layout.element, layout.model.hidden, layout.rows
    rows = layout.target_rows
    chunk = head_chunk_rows(layout.model.head_chunk, columns=columns, element=element, device="cuda")
    chunks = max(1, -(-rows // chunk))
    logits, matrix = rows * columns, columns * hidden
    stream = element * layout.tokens * hidden
    picked = element * rows * hidden
    # Rows are gathered, their gradients scattered into zeros; both gradients are scaled by that of the loss.
    around = 2 * picked + stream + 3 * picked + 2 * picked + 2 * element * matrix
    if chunks > 1 and element < 4:
        around += (4 + element) * matrix  # the fp32 sum becomes the gradient
    products = 6 * logits * hidden
    if layout.has_objective:
        # Maximum 4, difference 8, exponential 8, sum 4; zeros 4, difference 8, exponential 8, scale 8, sum 12.
        bytes_per_logit = 64 + (18 if element < 4 else 0)
        return Work(products, 0, bytes_per_logit * logits + around, 80 * chunks + 13)
    if layout.fused:
        # Read twice where tensor-parallel ranks exchange maxima; else the second read comes from the cache.
        reads, kernels = (2, 16 * chunks) if layout.tensor > 1 else (1, 13 * chunks // 2)
        return Work(products, 0, (1 + reads) * element * logits + around, kernels + 14)
    # Maximum 4, difference 8, exponential 8, sum 4, softmax 8, scale 8; conversions to fp32 and back.
    bytes_per_logit = 40 + (12 if element < 4 else 0)
    return Work(products, 0, bytes_per_logit * logits + around, 33 * chunks + 13)


def _ends(layout: Layout) -> Work:
    """Return the work of embedding and last norm, forward and backward."""
    element, hidden = layout.element, layout.model.hidden
    stream = element * layout.tokens * hidden
    residual = stream // layout.sequence_split
    table = element * layout.rows * hidden
    norm = 7 * residual + 12 * layout.tokens // layout.sequence_split + 3 * element * hidden
    # Rows are looked up and transposed to sequence-first; backward, the whole gradient of the table is written.
    masks = 4 * stream if layout.tensor > 1 else 0  # tokens whose row lies on another rank
    twice = 3 * table if layout.model.tied else 0  # both gradients of one table are added
    scattered = 2 * residual if layout.sequence_split > 1 else 0
    kernels = 3 + 1 + 1 + 8 + 2 * bool(masks) + bool(twice) + bool(scattered)
    return Work(bytes=norm + 5 * stream + table + masks + twice + scattered, kernels=kernels)


def _gradients(layout: Layout) -> Work:
    """Return DeepSpeed's work on the gradients of all micro-batches: sums, copies into buckets and out of them.

    The factors are bytes per element of its operators. Stage 1 in bf16: 6 to convert and 12 to add to the fp32 sum.
    Without `immediate_grad_update`, from the second micro-batch on, 2 to zero and 6 to add to a bf16 gradient.
    """
    ranks, times = layout.data_parallel, layout.batch.accumulation
    several, half = ranks > 1, layout.element < 4
    if layout.stage == 3:
        total = times * (22 + 12 / ranks)
    elif layout.stage == 2:
        total = times * (24 + 18 / ranks)
    elif layout.stage == 1 and not half:
        total = (times - 1) * 12 + 28 + 8 / ranks
    elif layout.stage == 1:
        held = 0 if layout.frees_gradients else 8
        bucket = 16 if layout.group_numels[0] <= FALLBACK_BUCKET else 8
        total = times * 18 + (times - 1) * held + bucket + 8 * several
    else:
        total = (times - 1) * 3 * layout.element + (20 if half else 16) + 8 * several
    return Work(bytes=round(total * layout.numel), kernels=3 * times * len(layout.parameters))


def _update(layout: Layout) -> Work:
    """Return the work of gradient norm, AdamW (28 bytes an element), new bf16 weights (6) and zeroed gradients."""
    if layout.offloaded("offload_optimizer"):
        return Work()
    ranks, half = layout.data_parallel, layout.element < 4
    if layout.stage == 1 and half:
        total = 8 + 34 / ranks  # the norm covers the whole gradient
    elif layout.stage:
        total = (50 if half else 48) / ranks
    else:
        total = 44 if half else 32
    return Work(bytes=round(total * layout.numel), kernels=4 * len(layout.parameters))
