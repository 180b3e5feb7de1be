"""The gradient's norm, and clipping by it, in the same arithmetic at every ZeRO stage, left on the device.

DeepSpeed 0.19 would take the norm itself. Without ZeRO, and in bf16 at stage 1, it adds up a tensor in fp32 (on a CPU
torch does so in one long row: half a percent is lost on 65 M elements); in bf16 without ZeRO it leaves out what other
tensor-parallel ranks hold, and waits for the device at every parameter; at stages 1 to 3 it waits for every group of
parameters. Here squares are summed in float64, and whoever wants the number reads it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 2**20  # elements; torch makes a float64 copy of what it sums on a CPU: 8 MB that stay in the cache

Gradients = Iterable[tuple[Tensor, Tensor]]
"""Parameter (for its mark `tensor_model_parallel`) and gradient, any dtype."""


@torch.no_grad()
def global_norm(
    groups: Iterable[Gradients],
    *,
    tensor_parallel: dist.ProcessGroup,
    shards: dist.ProcessGroup | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the L2 norm over all ranks that hold a part of the gradient: scalar, on the device; nothing waits for it.

    Args:
        groups: what this rank holds. A parameter without the mark is the same on all tensor-parallel ranks, and its
            gradient is counted once.
        tensor_parallel: the tensor-parallel ranks.
        shards: the data-parallel ranks where each holds a part of the gradient; None where each holds all of it.
        device: where the sums are kept.
        dtype: of the sums of a group and of what follows; squares within a group are summed in float64.
    """
    first = tensor_parallel.rank() == 0
    sums = torch.stack([_sum_of_squares(group, first, device) for group in groups]).to(dtype)
    for ranks in (shards, tensor_parallel):
        if ranks is not None and ranks.size() > 1:
            dist.all_reduce(sums, group=ranks)
    return torch.linalg.vector_norm(sums.sqrt())


def _sum_of_squares(gradients: Gradients, first: bool, device: torch.device) -> Tensor:
    pieces = [
        gradient.detach().flatten()
        for parameter, gradient in gradients
        if first or getattr(parameter, "tensor_model_parallel", False)
    ]
    if device.type == "cpu":
        pieces = [chunk for piece in pieces for chunk in piece.split(_CHUNK)]
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device=device)
    # On a GPU one pass over all tensors, converted as they are read.
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)).square().sum()


class Clipping:
    """Scales the gradients that an optimizer is about to apply.

    Args:
        optimizer: torch's optimizer inside DeepSpeed's: its gradients are fp32, whatever the precision of the model.
        bound: largest norm that is left as it is; 0 means no bound.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, bound: float) -> None:
        self._bound, self._factor = bound, 1.0
        optimizer.register_step_pre_hook(self._scale)

    def clip(self, norm: float) -> None:
        """Scale the next step's gradients so that `norm` becomes at most the bound (as DeepSpeed does: 1e-6 below)."""
        self._factor = min(1.0, self._bound / (norm + 1e-6)) if self._bound > 0 else 1.0

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._factor < 1.0:
            gradients: Sequence[Tensor] = [
                parameter.grad
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            torch._foreach_mul_(gradients, self._factor)
