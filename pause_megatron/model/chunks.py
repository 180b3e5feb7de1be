"""Chunks of rows in the LM head: how rows are split, and the gradient of the weight summed over chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ColumnRanges = list[tuple[int, int]]
"""Half-open ranges of logit columns."""


class Task(NamedTuple):
    """Arguments of the chunked losses that are not tensors."""

    cross_entropy: Callable[..., tuple[Tensor, Tensor | None]]
    masked: ColumnRanges
    chunk: int
    group: dist.ProcessGroup
    differentiable: bool
    hints: int
    hint_weight: float

    def hint_spans(self, rows: int) -> list[range]:
        """Return the chunks of the hints' rows."""
        return [range(start, min(start + self.chunk, rows)) for start in range(rows - self.hints, rows, self.chunk)]

    def spans(self, rows: int, scale: Tensor) -> list[tuple[int, int, Tensor]]:
        """Return the chunks of the rows, as (first, one past the last, factor of the gradient); none mixes in hints."""
        answers = rows - self.hints
        parts = [(0, answers, scale)]
        if self.hints:
            parts.append((answers, rows, scale * self.hint_weight))
        return [
            (start, min(start + self.chunk, last), factor)
            for first, last, factor in parts
            for start in range(first, last, self.chunk)
        ]


class WeightGradient:
    """Sum of the chunks' weight gradients, in fp32 and rounded once at the end; for one chunk, the product itself.

    Args:
        weight: [vocabulary shard, hidden].
        chunks: Number of chunks.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self._weight = weight
        self._sum: Tensor | None = None
        self._wide = chunks > 1 and weight.dtype != torch.float32

    def add(self, grad_logits: Tensor, rows: Tensor) -> None:
        """Add grad_logits^T rows: [rows, vocabulary shard], [rows, hidden] -> [vocabulary shard, hidden]."""
        left = grad_logits.t()
        result: dict[str, Any] = {}
        if self._wide and left.is_cuda:
            result = {"out_dtype": torch.float32}
        elif self._wide:  # on a CPU a product has the type of its factors
            left, rows = left.float(), rows.float()
        if self._sum is None:
            self._sum = torch.mm(left, rows, **result)
        else:
            torch.addmm(self._sum, left, rows, out=self._sum, **result)

    def result(self) -> Tensor:
        """Return the gradient in the weight's type; zeros where no row had a target."""
        if self._sum is None:
            return torch.zeros_like(self._weight)
        return self._sum.to(self._weight.dtype)


def take_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients that a forward pass left in `ctx.gradients`, times that of its loss; once only.

    Args:
        ctx: Context of an autograd function.
        grad_loss: Gradient of its loss, a scalar.
    """
    if ctx.gradients is None:
        raise RuntimeError("LM head: expected one backward pass, got a second; its gradients are kept for one only")
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if g is None else g.mul_(grad_loss) for g in gradients)
