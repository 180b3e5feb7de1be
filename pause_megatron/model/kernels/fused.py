"""The three functions with gradients of their own, over forward and backward pieces that each read and write once.

The pieces come in two forms: Triton kernels (`triton_kernels`), and `torch.compile` of the same arithmetic in torch.
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
class Pieces:
    """What one form computes, without gradients; everything inside is fp32.

    Attributes:
        turn: (x, cos, sin, back) -> x turned by the angles, or back by them. Arguments as `Kernels.rotate`
        gate: x [..., 2 f] -> silu(first half) * second half
        ungate: (gradient [..., f], x [..., 2 f]) -> gradient for x
        statistics: (logits [rows, columns], targets int64 [rows]) -> fp32 [3, rows]: the highest logit, the sum of
            exp(logit - highest), the target's logit (0 for a target outside of 0 .. columns - 1)
        gradient_: (logits, targets, highest, total fp32 [rows], scale scalar) -> None; the logits become
            scale * (softmax - one at the target)
        loss_and_gradient_: (logits, targets, scale) -> losses fp32 [rows]: both for a whole vocabulary, the gradient in
            place. None: the two above in turn
    """

    turn: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    gate: Callable[[Tensor], Tensor]
    ungate: Callable[[Tensor, Tensor], Tensor]
    statistics: Callable[[Tensor, Tensor], Tensor]
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    loss_and_gradient_: Callable[[Tensor, Tensor, Tensor], Tensor] | None

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `Kernels.rotate`."""
        return _Rotate.apply(x, cos, sin, self.turn)

    def swiglu(self, x: Tensor) -> Tensor:
        """As `Kernels.swiglu`."""
        return _SwiGLU.apply(x, self.gate, self.ungate)

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, scale: Tensor, group: dist.ProcessGroup, differentiable: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `Kernels.cross_entropy`, the gradient in the place of the logits."""
        if group.size() == 1 and differentiable and self.loss_and_gradient_ is not None:
            return self.loss_and_gradient_(logits, targets, scale), logits
        targets = targets - group.rank() * logits.shape[-1]
        highest, total, predicted = self.statistics(logits, targets)
        if group.size() > 1:
            own = highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            # A shard without a live column has a highest logit of -inf and a sum of 0; exp(-inf) keeps it so.
            sums = torch.stack((total * torch.exp(own - highest), predicted))
            dist.all_reduce(sums, group=group)
            total, predicted = sums
        losses = total.log() + highest - predicted
        if not differentiable:
            return losses, None
        self.gradient_(logits, targets, highest, total, scale)
        return losses, logits


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so that neither x nor the result is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, turn: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.turn(gradient, *ctx.saved_tensors, True), None, None, None


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: silu and product are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Callable[..., Tensor], ungate: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ungate = ungate
        return gate(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ungate(gradient.contiguous(), *ctx.saved_tensors), None, None


@cache
def triton_pieces() -> Pieces:
    """One kernel each, registered as operators, so that fake and meta tensors pass through them."""
    from pause_megatron.model.kernels import operators

    ops = operators.registered()
    return Pieces(
        ops.rotate, ops.swiglu, ops.swiglu_backward, ops.logit_statistics, ops.logit_gradient_, ops.cross_entropy_
    )


def torch_pieces(prepare: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function) -> Pieces:
    """The same arithmetic in torch, operation by operation; `prepare` is done to each function."""
    return Pieces(*map(prepare, (_turn, _gate, _ungate, _statistics, _gradient_)), None)


@cache
def compiled_pieces() -> Pieces:
    """`torch.compile` of `torch_pieces`; each is compiled at its first call, some seconds a function."""
    return torch_pieces(torch.compile)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    cos, sin = cos.unsqueeze(2), (-sin if back else sin).unsqueeze(2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _gate(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def _ungate(gradient: Tensor, x: Tensor) -> Tensor:
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
    here = (targets >= 0) & (targets < columns)
    found = logits.gather(-1, targets.clamp(0, columns - 1).unsqueeze(-1)).squeeze(-1)
    return torch.stack((highest, total, torch.where(here, found, 0.0)))


def _gradient_(logits: Tensor, targets: Tensor, highest: Tensor, total: Tensor, scale: Tensor) -> None:
    softmax = torch.exp(logits.float() - highest.unsqueeze(-1)) * (scale / total).unsqueeze(-1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    logits.copy_(torch.where(columns == targets.unsqueeze(-1), softmax - scale, softmax))
