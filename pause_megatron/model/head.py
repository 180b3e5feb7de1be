"""The LM head: logits and cross-entropy of the rows that have a target, one chunk of rows at a time.

Goyal et al. (ICLR 2024, section 3) mask every position whose next token is a pause. Such rows do not reach this head,
so nothing is computed for them. The other rows are processed in chunks; the last rows may be hints, with a weight. The
gradients of a chunk are computed in the forward pass, so that logits exist for one chunk at a time (as in torchtitan's
chunked loss). The cross-entropy itself is in `pause_megatron.model.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from pause_megatron.config.presets import head_chunk_rows
from pause_megatron.model.chunks import ColumnRanges, Task, WeightGradient, take_gradients
from pause_megatron.model.kernels import Kernels
from pause_megatron.model.objective_head import ObjectiveTask, chunked_objective
from pause_megatron.objective import Objective, Steps


class LMLoss(NamedTuple):
    """The loss of a micro-batch. A named tuple, because DeepSpeed's hooks look for tensors in tuples only.

    Attributes:
        loss: loss_scale * sum, scalar fp32; the only differentiable field.
        sum: Sum of the token losses in nats, hints excluded, scalar fp32.
        count: Number of targets, hints excluded.
        token_losses: Loss of each target, fp32 [targets].
        hint_losses: Loss of each hint, fp32 [hints]; None: there are none.
        terms: Sum of the objective's terms, scalar fp64; None: the objective is the sum of the token losses.
        means: Sum and weights of each mean that the objective logs, fp64 [names, 2]; None as `terms`.
    """

    loss: Tensor
    sum: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count
    token_losses: Tensor
    hint_losses: Tensor | None = None
    terms: Tensor | None = None
    means: Tensor | None = None


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

    Attributes:
        objective: What is minimized at the rows of `steps`; None: the cross-entropy.
        pause_ids: The K pause ids.
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
        self.objective: Objective | None = None
        self.pause_ids: Sequence[int] = ()

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
        steps: Steps | None = None,
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
            steps: Rows of the targets for the objective, which replace one row a target.

        Returns:
            Without targets (logits, bias), as ColumnParallelLinear. With targets and a scale: (scaled sum, sum without
            hints, token losses [targets, hints]), and with steps the objective's sum and means, as in `LMLoss`. With
            targets only: (token losses [rows],).
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
        task = Task(self._cross_entropy, self.masked, chunk, self.tp_group, differentiable, hints, hint_weight)
        if self.objective is not None and steps is not None:
            of_objective = ObjectiveTask(self.objective, steps, self.pause_ids, task)
            return chunked_objective(input_, weight, targets, loss_scale, of_objective)
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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of vocabulary-parallel cross-entropies, with gradients computed chunk by chunk in the forward pass.

    rows [rows, hidden] are the same on all ranks of the group, weight [vocabulary shard, hidden] is this rank's. The
    gradient of rows is this rank's part of the sum over the vocabulary; the caller reduces it over the group.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, task: Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = rows.shape[0]
        spans = task.spans(count, scale)
        token_losses = torch.empty(count, dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if task.differentiable and ctx.needs_input_grad[0] else None
        grad_weight = None
        if task.differentiable and ctx.needs_input_grad[1]:
            grad_weight = WeightGradient(weight, chunks=len(spans))
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
        return *take_gradients(ctx, grad_loss), None, None, None
