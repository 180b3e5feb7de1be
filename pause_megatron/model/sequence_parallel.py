"""Gradient all-reduce over tensor-parallel ranks that sequence parallelism needs and DeepSpeed lacks.

Under sequence parallelism every tensor-parallel rank has a part of the sequence, so the gradient of a replicated
parameter (norm weights) is a partial sum on each. Megatron-LM all-reduces them in its own optimizer. DeepSpeed does
not: without these hooks it would silently train on wrong gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pause_megatron.errors import TrainingError


def sum_gradients_over(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Sum the gradients of all parameters marked `sequence_parallel` over the tensor-parallel group.

    A hook on the parameter runs before the gradient is accumulated, so before DeepSpeed gets it, at any ZeRO stage.
    Call it before `deepspeed.initialize`.

    Args:
        model: This rank's shard.
        group: Tensor-parallel group.

    Returns:
        Number of parameters whose gradients are summed.
    """
    if group.size() == 1:
        return 0

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    marked = [p for p in model.parameters() if getattr(p, "sequence_parallel", False)]
    for parameter in marked:
        parameter.register_hook(summed)
    return len(marked)


def check_gradient_sums(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Check that the gradient of every replicated parameter is summed over the tensor-parallel ranks.

    Each rank r backpropagates the gradient r + 1 to each such parameter; it must arrive as 1 + 2 + ... + ranks.

    Args:
        model: This rank's shard.
        group: Tensor-parallel group.

    Raises:
        TrainingError: Names a parameter whose gradients would differ between ranks.
    """
    size = group.size()
    for name, parameter in model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            continue
        (got,) = torch.autograd.grad(parameter.flatten()[:1].sum() * (group.rank() + 1), parameter)
        expected = size * (size + 1) / 2
        if float(got.flatten()[0]) != expected:
            raise TrainingError(
                f"sequence parallelism: {name}: expected a gradient summed over the {size} tensor-parallel ranks, "
                f"{expected}, got {float(got.flatten()[0])}"
            )
