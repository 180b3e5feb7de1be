"""The gradient norm, and clipping by it, where DeepSpeed's own norm is not exact.

Without ZeRO, and in bf16 at stage 1, DeepSpeed 0.19 takes a tensor's norm in fp32. On a CPU torch adds up in one long
row: half a percent is lost on 65 M elements. In bf16 without ZeRO it loses the marks of tensor parallelism as well and
leaves out what the other tensor-parallel ranks hold. At the other stages it adds up in float64, as is done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 2**20  # elements; torch makes a float64 copy of what it sums on a CPU: 8 MB that stay in the cache


def norm_is_exact(ds_config: dict) -> bool:
    """Whether DeepSpeed itself sums the squares of the gradient in float64 under a configuration."""
    zero = ds_config["zero_optimization"]
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    fp32_sums = ds_config["data_types"]["grad_accum_dtype"] == "fp32"
    if zero["stage"] == 1 and ds_config["bf16"]["enabled"]:
        return offloaded or not fp32_sums
    return zero["stage"] > 0


def reduced_gradients(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of this rank and their gradients, whole and summed over the data-parallel ranks.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` of the kind for which `norm_is_exact` is False, behind its last backward.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_gradients"):  # bf16 at stage 1: the fp32 sums over the micro-batches
        for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            yield from zip(parameters, gradients, strict=True)
        return
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            yield parameter, parameter.grad


@torch.no_grad()
def global_norm(gradients: Iterable[tuple[Tensor, Tensor]], group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the L2 norm over all tensor-parallel ranks, squares summed in float64; the host reads once.

    Args:
        gradients: parameter (for its mark `tensor_model_parallel`) and gradient, any dtype. A parameter without the
            mark is the same on all ranks of `group`, and its gradient is counted once.
        group: the tensor-parallel ranks.
        device: where the sum is kept.
    """
    first = group.rank() == 0
    norms = [
        torch.linalg.vector_norm(chunk, dtype=torch.float64)
        for parameter, gradient in gradients
        if first or getattr(parameter, "tensor_model_parallel", False)
        for chunk in gradient.detach().flatten().split(_CHUNK)
    ]
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return math.sqrt(float(total))


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
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._factor)
