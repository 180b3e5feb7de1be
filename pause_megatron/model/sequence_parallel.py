"""Sums over tensor-parallel ranks that sequence parallelism needs and DeepSpeed does not make.

Under sequence parallelism every tensor-parallel rank sees a part of the sequence, so the gradient of a parameter that
all of them hold (norm weights) is a partial sum on each. Megatron-LM adds them up in its own optimizer; DeepSpeed does
not, and trains on silently wrong gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pause_megatron.errors import TrainingError


def sum_gradients_over(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Sum the gradients of all parameters marked `sequence_parallel` over the tensor-parallel group.

    A hook on the parameter runs before the gradient is accumulated, so before DeepSpeed, at any ZeRO stage, sees it.
    Call it before `deepspeed.initialize`.

    Returns:
        Number of parameters that are summed.
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
    """Show that the gradient of every parameter held by all tensor-parallel ranks is summed over them.

    Each rank r sends the gradient r + 1 to each such parameter; what arrives must be 1 + 2 + ... + ranks.

    Raises:
        TrainingError: a parameter whose gradients would differ between ranks, by name.
    """
    size = group.size()
    for name, parameter in model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            continue
        (got,) = torch.autograd.grad(parameter.flatten()[:1].sum() * (group.rank() + 1), parameter)
        expected = size * (size + 1) / 2
        if float(got.flatten()[0]) != expected:
            raise TrainingError(
                f"sequence parallelism: the gradient of {name} is not summed over the {size} tensor-parallel ranks "
                f"(expected {expected}, got {float(got.flatten()[0])})"
            )
