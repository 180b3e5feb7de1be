"""The LM head: logits and cross-entropy of the rows that have a target, one chunk of rows at a time.

Goyal et al. (ICLR 2024, section 3) mask every position whose next token is a pause. Such rows do not reach this head,
so nothing is computed for them. The other rows are processed in chunks; the last rows may be hints, with a weight. The
gradients of a chunk are computed in the forward pass, so that logits exist for one chunk at a time (as in torchtitan's
chunked loss). The cross-entropy itself is in `pause_megatron.model.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from pause_megatron.config.presets import head_chunk_rows
from pause_megatron.model.kernels import Kernels

ColumnRanges = list[tuple[int, int]]
"""Half-open ranges of logit columns."""


class LMLoss(NamedTuple):
    """The loss of a micro-batch. A named tuple, because DeepSpeed's hooks look for tensors in tuples only.

    Attributes:
        loss: loss_scale * sum, scalar fp32; the only differentiable field.
        sum: Sum of the token losses in nats, hints excluded, scalar fp32.
        count: Number of targets, hints excluded.
        token_losses: Loss of each target, fp32 [targets].
        hint_losses: Loss of each hint, fp32 [hints]; None: there are none.
    """

    loss: Tensor
    sum: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count
    token_losses: Tensor
    hint_losses: Tensor | None = None


class _Weighted(Protocol):
    """A module with a weight."""

    weight: Tensor


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """megatron-core's output layer, with the loss.

    The loss is computed inside this module's `forward`, because ZeRO-3 gathers a module's weight for its forward only.

    Args:
        *sizes: Input and output size, as in ColumnParallelLinear.
        masked: Columns of this rank's shard that are masked out of the softmax.
        chunk: Rows of logits that exist at one time; None: by memory.
        kernels: Kernels of the cross-entropy.
        embedding: Module whose weight is used, for tied embeddings; else None. It is not a child of this module, so
            that the weight has one name in a checkpoint.
        **linear: Further arguments of ColumnParallelLinear.
    """

    def __init__(
        self,
        *sizes: int,
        masked: ColumnRanges,
        chunk: int | None,
        kernels: Kernels,
        embedding: _Weighted | None,
        **linear: Any,
    ) -> None:
        super().__init__(*sizes, bias=False, skip_weight_param_allocation=embedding is not None, **linear)
        self.masked = masked
        self.chunk = chunk
        self._cross_entropy = kernels.cross_entropy
        self._tied_to = (embedding,)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        targets: Tensor | None = None,
        loss_scale: Tensor | None = None,
        hints: int = 0,
        hint_weight: float = 1.0,
    ) -> tuple[Any, ...]:
        """Compute logits, or the loss.

        Args:
            input_: [seq, batch, hidden] without targets; [rows, hidden] with targets.
            weight: As in ColumnParallelLinear; default: its own or the tied one.
            runtime_gather_output: As in ColumnParallelLinear.
            targets: Target ids, int64 [rows]. A target on a masked column has an infinite loss.
            loss_scale: Scalar fp32. None: each token loss is differentiable, and all logits exist at one time.
            hints: Number of rows at the end that are hints.
            hint_weight: Weight of each of them in the scaled sum.

        Returns:
            Without targets (logits, bias), as ColumnParallelLinear. With targets and a scale: (scaled sum, sum without
            hints, token losses [rows]). With targets only: (token losses [rows],).
        """
        (embedding,) = self._tied_to
        if weight is None and embedding is not None:
            # Read here and not by the caller, so that ZeRO-3 gathers the shared weight for this module.
            weight = embedding.weight
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        if weight is None:
            weight = self.weight
        if loss_scale is None:
            logits = mask_columns(torch.matmul(input_, weight.t()), self.masked)
            return (tensor_parallel.vocab_parallel_cross_entropy(logits, targets),)
        chunk = head_chunk_rows(
            self.chunk, columns=weight.shape[0], element=weight.element_size(), device=weight.device.type
        )
        differentiable = torch.is_grad_enabled()
        task = _Task(self._cross_entropy, self.masked, chunk, self.tp_group, differentiable, hints, hint_weight)
        return _ChunkedCrossEntropy.apply(input_, weight, targets, loss_scale, task)


def mask_columns(logits: Tensor, masked: ColumnRanges) -> Tensor:
    """Set masked columns of logits to -inf.

    Args:
        logits: [..., vocabulary shard].
        masked: Columns of the shard.

    Returns:
        The same tensor where no column is masked.
    """
    if not masked:
        return logits
    columns = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    for start, stop in masked:
        columns[start:stop] = True
    return logits.masked_fill(columns, float("-inf"))


class _Task(NamedTuple):
    """Arguments of `_ChunkedCrossEntropy` that are not tensors."""

    cross_entropy: Callable[..., tuple[Tensor, Tensor | None]]
    masked: ColumnRanges
    chunk: int
    group: dist.ProcessGroup
    differentiable: bool
    hints: int
    hint_weight: float

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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of vocabulary-parallel cross-entropies, with gradients computed chunk by chunk in the forward pass.

    rows [rows, hidden] are the same on all ranks of the group, weight [vocabulary shard, hidden] is this rank's. The
    gradient of rows is this rank's part of the sum over the vocabulary; the caller reduces it over the group.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = rows.shape[0]
        spans = task.spans(count, scale)
        token_losses = torch.empty(count, dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if task.differentiable and ctx.needs_input_grad[0] else None
        grad_weight = None
        if task.differentiable and ctx.needs_input_grad[1]:
            grad_weight = _WeightGradient(weight, chunks=len(spans))
        # One buffer for all chunks: on a CPU, new pages for each chunk cost more than the softmax.
        buffer = rows.new_empty(min(task.chunk, count), weight.shape[0])
        for start, stop, factor in spans:
            x = rows[start:stop]
            logits = torch.mm(x, weight.t(), out=buffer[: x.shape[0]])
            for low, high in task.masked:
                logits[:, low:high] = float("-inf")
            token_losses[start:stop], grad_logits = task.cross_entropy(
                logits, targets[start:stop], factor, task.group, task.differentiable
            )
            if grad_logits is None:
                continue
            if grad_rows is not None:
                torch.mm(grad_logits, weight, out=grad_rows[start:stop])
            if grad_weight is not None:
                grad_weight.add(grad_logits, x)
        ctx.gradients = grad_rows, None if grad_weight is None else grad_weight.result()
        total = token_losses[: count - task.hints].sum()
        objective = scale * total
        if task.hints:
            objective = objective + scale * task.hint_weight * token_losses[count - task.hints :].sum()
        ctx.mark_non_differentiable(total, token_losses)
        ctx.set_materialize_grads(False)
        return objective, total, token_losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("LM head: expected one backward pass, got a second; its gradients are kept for one only")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None


class _WeightGradient:
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
