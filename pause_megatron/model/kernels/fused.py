"""Fused kernels with their own autograd, over forward and backward primitives that read and write memory once.

The primitives have two implementations: Triton kernels (`triton_kernels`), and `torch.compile` of torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Primitives:
    """The primitives of one implementation, without autograd; all compute in fp32.

    Attributes:
        rotate_by: (x, cos, sin, back) -> x rotated by the angles, or by the negative angles. Arguments as
            `Kernels.rotate`.
        swiglu_forward: x [..., 2 f] -> silu(first half) * second half.
        swiglu_backward: (gradient [..., f], x [..., 2 f]) -> gradient for x.
        statistics: (logits [rows, columns], targets int64 [rows]) -> fp32 [3, rows]: the highest logit, the sum of
            exp(logit - highest), the target's logit (0 for a target outside of 0 .. columns - 1).
        gradient_: (logits, targets, highest, total fp32 [rows], scale scalar) -> None. Overwrites the logits with
            scale * (softmax - one-hot target).
        loss_and_gradient_: (logits, targets, scale) -> losses fp32 [rows]. Both for a whole vocabulary, the gradient in
            place of the logits. None: the two above, one after the other.
    """

    rotate_by: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    swiglu_forward: Callable[[Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor], Tensor]
    statistics: Callable[[Tensor, Tensor], Tensor]
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    loss_and_gradient_: Callable[[Tensor, Tensor, Tensor], Tensor] | None

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate queries or keys; arguments as `Kernels.rotate`."""
        return _Rotate.apply(x, cos, sin, self.rotate_by)

    def swiglu(self, x: Tensor) -> Tensor:
        """Compute SwiGLU; arguments as `Kernels.swiglu`."""
        return _SwiGLU.apply(x, self.swiglu_forward, self.swiglu_backward)

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, scale: Tensor, group: dist.ProcessGroup, differentiable: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the cross-entropy as `Kernels.cross_entropy`, the gradient in place of the logits."""
        if group.size() == 1 and differentiable and self.loss_and_gradient_ is not None:
            return self.loss_and_gradient_(logits, targets, scale), logits
        targets = targets - group.rank() * logits.shape[-1]
        highest, total, predicted = self.statistics(logits, targets)
        if group.size() > 1:
            own = highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            # A shard without a live column has a highest logit of -inf and a sum of 0, which exp(-inf) preserves.
            sums = torch.stack((total * torch.exp(own - highest), predicted))
            dist.all_reduce(sums, group=group)
            total, predicted = sums
        losses = total.log() + highest - predicted
        if not differentiable:
            return losses, None
        self.gradient_(logits, targets, highest, total, scale)
        return losses, logits


class _Rotate(torch.autograd.Function):
    """Rotary embedding. Its gradient is the rotation back, so that neither x nor the result is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotate_by: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate_by = rotate_by
        return rotate_by(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rotate_by(gradient, *ctx.saved_tensors, True), None, None, None


class _SwiGLU(torch.autograd.Function):
    """SwiGLU. It saves only its input, and recomputes silu and product in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.swiglu_backward = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.swiglu_backward(gradient.contiguous(), *ctx.saved_tensors), None, None


@cache
def triton_primitives() -> Primitives:
    """Return the Triton kernels, registered as operators, so that they support fake and meta tensors."""
    from pause_megatron.model.kernels import operators

    ops = operators.registered()
    return Primitives(
        ops.rotate, ops.swiglu, ops.swiglu_backward, ops.logit_statistics, ops.logit_gradient_, ops.cross_entropy_
    )


def torch_primitives() -> Primitives:
    """Return the same arithmetic in torch, operation by operation."""
    return Primitives(_rotate_by, _swiglu_forward, _swiglu_backward, _statistics, _gradient_, None)


@cache
def compiled_primitives() -> Primitives:
    """Return `torch.compile` of `torch_primitives`. Each compiles at its first call, in some seconds."""
    compiled = torch.compile
    return Primitives(
        compiled(_rotate_by),
        compiled(_swiglu_forward),
        compiled(_swiglu_backward),
        compiled(_statistics),
        compiled(_gradient_),
        None,
    )


def _rotate_by(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    cos, sin = cos.unsqueeze(2), (-sin if back else sin).unsqueeze(2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _swiglu_forward(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def _swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    gradient, slope = gradient.float(), torch.sigmoid(gate)
    inner = gradient * up * slope * (1 + gate * (1 - slope))
    return torch.cat((inner, gradient * gate * slope), dim=-1).to(x.dtype)


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    columns = logits.shape[-1]
    logits = logits.float()
    highest = logits.amax(dim=-1)
    shift = torch.where(highest == float("-inf"), 0.0, highest)
    total = torch.exp(logits - shift.unsqueeze(-1)).sum(dim=-1)
    in_shard = (targets >= 0) & (targets < columns)
    predicted = logits.gather(-1, targets.clamp(0, columns - 1).unsqueeze(-1)).squeeze(-1)
    return torch.stack((highest, total, torch.where(in_shard, predicted, 0.0)))


def _gradient_(logits: Tensor, targets: Tensor, highest: Tensor, total: Tensor, scale: Tensor) -> None:
    softmax = torch.exp(logits.float() - highest.unsqueeze(-1)) * (scale / total).unsqueeze(-1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    logits.copy_(torch.where(columns == targets.unsqueeze(-1), softmax - scale, softmax))
