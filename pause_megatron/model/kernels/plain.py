"""Plain implementation: the three functions as megatron-core computes them, in torch operations."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as CrossEntropy
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys, rounded as in megatron-core's `apply_rotary_pos_emb`; arguments as `Kernels.rotate`."""
    cos, sin = (torch.cat((half, half), dim=-1).unsqueeze(2).to(x.dtype) for half in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(x: Tensor) -> Tensor:
    """Compute SwiGLU as megatron-core's MLP does; arguments as `Kernels.swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: Tensor, group: dist.ProcessGroup, differentiable: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the cross-entropy as megatron-core does; arguments as `Kernels.cross_entropy`."""
    columns = logits.shape[-1]
    parallel = group.size() > 1
    dtype = logits.dtype
    logits, highest = CrossEntropy.calculate_logits_max(logits)
    if parallel:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    first = group.rank() * columns
    elsewhere, local_targets, predicted, total, exponentials = CrossEntropy.calculate_predicted_logits(
        logits, targets, highest, first, first + columns
    )
    if parallel:
        dist.all_reduce(predicted, group=group)
        dist.all_reduce(total, group=group)
    softmax, losses = CrossEntropy.calculate_cross_entropy_loss(exponentials, predicted, total)
    if not differentiable:
        return losses, None
    grad_2d, index, update, grad = CrossEntropy.prepare_gradient_calculation_operands(softmax, elsewhere)
    grad = CrossEntropy.calculate_gradients(grad_2d, index, local_targets, update, grad, scale.expand(losses.shape[0]))
    return losses, grad.to(dtype)
