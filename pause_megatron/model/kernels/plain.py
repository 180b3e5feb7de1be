"""The three functions as megatron-core computes them, torch operation by torch operation."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Pieces
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels, with the roundings of megatron-core's `apply_rotary_pos_emb`. As `Kernels.rotate`."""
    cos, sin = (torch.cat((half, half), dim=-1).unsqueeze(2).to(x.dtype) for half in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(x: Tensor) -> Tensor:
    """Gate the second half by the first, as megatron-core's MLP. Arguments as `Kernels.swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: Tensor, group: dist.ProcessGroup, differentiable: bool
) -> tuple[Tensor, Tensor | None]:
    """The arithmetic of megatron-core's `vocab_parallel_cross_entropy`, piece by piece. As `Kernels.cross_entropy`."""
    columns = logits.shape[-1]
    parallel = group.size() > 1
    dtype = logits.dtype
    logits, highest = Pieces.calculate_logits_max(logits)
    if parallel:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    first = group.rank() * columns
    elsewhere, local_targets, predicted, total, exponentials = Pieces.calculate_predicted_logits(
        logits, targets, highest, first, first + columns
    )
    if parallel:
        dist.all_reduce(predicted, group=group)
        dist.all_reduce(total, group=group)
    softmax, losses = Pieces.calculate_cross_entropy_loss(exponentials, predicted, total)
    if not differentiable:
        return losses, None
    grad_2d, index, update, grad = Pieces.prepare_gradient_calculation_operands(softmax, elsewhere)
    grad = Pieces.calculate_gradients(grad_2d, index, local_targets, update, grad, scale.expand(losses.shape[0]))
    return losses, grad.to(dtype)
