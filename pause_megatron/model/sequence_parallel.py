"""Gradient all-reduce over tensor-parallel ranks that replicated parameters need and DeepSpeed lacks.

Under sequence parallelism every tensor-parallel rank has a part of the sequence, so the gradient of a replicated
parameter (norm weights) is a partial sum on each. With or without it, every rank has some of the heads, so the
gradients of the norms of queries and keys are partial sums, too. Megatron-LM all-reduces both in its own optimizer.
DeepSpeed does not: without these hooks it would silently train on wrong gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from pause_megatron.errors import TrainingError


def sum_gradients_over(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Sum the gradients of norms of queries and keys, and of parameters marked `sequence_parallel`, over the group.

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

    named = model.named_parameters()
    marked = [p for name, p in named if getattr(p, "sequence_parallel", False) or _of_own_heads(name)]
    for parameter in marked:
        parameter.register_hook(summed)
    return len(marked)


def check_gradient_sums(model: MegatronModule, group: dist.ProcessGroup) -> None:
    """Check that gradients of replicated parameters are summed over the tensor-parallel ranks where they are partial.

    Each rank r backpropagates the gradient r + 1 to each such parameter. A partial one must arrive as 1 + 2 + ... +
    ranks, and any other as r + 1, for it is the same on every rank in training.

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
        partial = model.config.sequence_parallel or _of_own_heads(name)
        expected = size * (size + 1) / 2 if partial else group.rank() + 1.0
        if float(got.flatten()[0]) != expected:
            raise TrainingError(
                f"tensor parallelism: {name}: expected a gradient {'' if partial else 'not '}summed over the {size} "
                f"tensor-parallel ranks, {expected}, got {float(got.flatten()[0])}"
            )


def _of_own_heads(name: str) -> bool:
    """Return whether a parameter is the norm of queries or keys: megatron-core recognizes them by name, too."""
    return "q_layernorm" in name or "k_layernorm" in name
