"""The LM head under an objective: its terms and gradients, one chunk of whole runs at a time.

As the cross-entropy of `pause_megatron.model.head`, but a target has the rows of its run, and autograd gives the slopes
of the logits within a chunk. Rows of hints follow those of the targets; their loss is the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pause_megatron.model.chunks import Task, WeightGradient, take_gradients
from pause_megatron.objective import Chunk, Objective, Steps, Terms
from pause_megatron.objective.chunk import Columns


class ObjectiveTask(NamedTuple):
    """Arguments of `chunked_objective` that are not differentiable.

    Attributes:
        objective: The objective.
        steps: Rows of the targets, which the hints follow.
        pause_ids: The K pause ids.
        task: Masks, chunk, ranks and hints, as for the cross-entropy.
    """

    objective: Objective
    steps: Steps
    pause_ids: Sequence[int]
    task: Task

    def columns(self, width: int) -> Columns:
        """Return which columns this rank has.

        Args:
            width: Number of them.
        """
        group = self.task.group
        first = group.rank() * width
        pauses = [row - first for row in self.pause_ids if first <= row < first + width]
        return Columns(first, pauses, self.pause_ids, group)


def chunked_objective(
    rows: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, arguments: ObjectiveTask
) -> tuple[Tensor, ...]:
    """Return scaled loss, sum of cross-entropies, cross-entropy of each target and hint, sum of terms, and means.

    Args:
        rows: Rows of the runs, then of the hints, [rows, hidden], the same on all tensor-parallel ranks.
        weight: This rank's shard, [vocabulary shard, hidden].
        targets: Ids of targets and hints.
        scale: Factor of the terms, scalar fp32.
        arguments: The rest.
    """
    result: tuple[Tensor, ...] = _ChunkedObjective.apply(rows, weight, targets, scale, arguments)
    return result


class _ChunkedObjective(torch.autograd.Function):
    """Sum of an objective's terms and of the hints' cross-entropies, with gradients computed in the forward pass.

    Rows and weight, and the gradients of both, are as in the chunked cross-entropy: the caller adds up the gradient of
    rows over tensor-parallel ranks. What an objective derives from hidden states is the same on all of these ranks, so
    each contributes its share of it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, arguments: ObjectiveTask
    ) -> tuple[Tensor, ...]:
        spans = arguments.steps.spans(arguments.task.chunk)
        hint_spans = arguments.task.hint_spans(rows.shape[0])
        chunks = len(spans) + len(hint_spans)
        sums = _Sums(rows, weight, targets, arguments, chunks, needed=ctx.needs_input_grad[:2])
        longest = max((len(each) for each in (*(span for _, span in spans), *hint_spans)), default=0)
        # One buffer for all chunks: on a CPU, new pages for each chunk cost more than the softmax.
        buffer = rows.new_empty(longest, weight.shape[0])
        for numbers, span in spans:
            sums.add_targets(numbers, span, buffer, scale)
        for span in hint_spans:
            sums.add_hints(span, buffer, scale * arguments.task.hint_weight)
        ctx.gradients = sums.grad_rows, None if sums.grad_weight is None else sums.grad_weight.result()
        answers = targets.shape[0] - arguments.task.hints
        loss = scale * sums.value.float()
        if arguments.task.hints:
            loss = loss + scale * arguments.task.hint_weight * sums.losses[answers:].sum()
        total = sums.losses[:answers].sum()
        ctx.mark_non_differentiable(total, sums.losses, sums.value, sums.means)
        ctx.set_materialize_grads(False)
        return loss, total, sums.losses, sums.value, sums.means

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *take_gradients(ctx, grad_loss), None, None, None


class _Sums:
    """What the chunks of a micro-batch add up to.

    Args:
        rows: As `chunked_objective`.
        weight: As `chunked_objective`.
        targets: Ids of targets and hints.
        arguments: As `chunked_objective`.
        chunks: Number of chunks.
        needed: Whether the gradients of rows and weight are needed.

    Attributes:
        losses: Cross-entropy of each target and hint, fp32.
        value: Sum of the terms, scalar fp64.
        means: Sum and weights of each mean, fp64 [names, 2].
        grad_rows: Gradient of rows, or None.
        grad_weight: Sum of the weight's gradient, or None.
    """

    def __init__(
        self,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        arguments: ObjectiveTask,
        chunks: int,
        needed: Sequence[bool],
    ) -> None:
        objective, _, _, task = arguments
        self._rows, self._weight, self._targets, self._arguments = rows, weight, targets, arguments
        self._columns = arguments.columns(weight.shape[0])
        self.losses = torch.empty(targets.shape[0], dtype=torch.float32, device=rows.device)
        self.value = torch.zeros((), dtype=torch.float64, device=rows.device)
        self.means = torch.zeros(len(objective.names), 2, dtype=torch.float64, device=rows.device)
        self.grad_rows = torch.empty_like(rows) if task.differentiable and needed[0] else None
        self.grad_weight = WeightGradient(weight, chunks) if task.differentiable and needed[1] else None

    def add_targets(self, numbers: range, span: range, buffer: Tensor, scale: Tensor) -> None:
        """Add a chunk of targets.

        Args:
            numbers: Its targets.
            span: Its rows.
            buffer: Memory for logits.
            scale: Factor of the gradient.
        """
        objective, steps, _, task = self._arguments
        targets, rows = slice(numbers.start, numbers.stop), slice(span.start, span.stop)
        x, logits = self._logits(span, buffer)
        with torch.enable_grad():
            chunk = Chunk(
                logits,
                x,
                targets=self._targets[targets],
                sizes=steps.sizes[targets],
                is_pause=steps.is_pause[rows],
                weights=steps.weights[rows],
                longest=steps.longest(numbers),
                columns=self._columns,
                differentiable=task.differentiable,
            )
            terms = objective.terms(chunk)
            value = terms.values.sum()
            if task.differentiable:
                grad_logits, grad_hidden = chunk.gradient(value * scale)
        self.losses[targets] = terms.token_losses.detach()
        self.value += value.detach().double()
        self._add_means(terms)
        if task.differentiable:
            self._add_gradient(span, x, grad_logits, grad_hidden)

    def add_hints(self, span: range, buffer: Tensor, scale: Tensor) -> None:
        """Add a chunk of hints.

        Args:
            span: Its rows.
            buffer: Memory for logits.
            scale: Factor of the gradient.
        """
        task, first = self._arguments.task, self._rows.shape[0] - self._targets.shape[0]
        numbers = slice(span.start - first, span.stop - first)  # the last hint is the last row and the last target
        x, logits = self._logits(span, buffer)
        self.losses[numbers], gradient = task.cross_entropy(
            logits, self._targets[numbers], scale, task.group, task.differentiable
        )
        if gradient is not None:
            self._add_gradient(span, x, gradient, None)

    def _logits(self, span: range, buffer: Tensor) -> tuple[Tensor, Tensor]:
        x = self._rows[span.start : span.stop]
        logits = torch.mm(x, self._weight.t(), out=buffer[: len(span)])
        for low, high in self._arguments.task.masked:
            logits[:, low:high] = float("-inf")
        return x, logits

    def _add_means(self, terms: Terms) -> None:
        for row, name in zip(self.means, self._arguments.objective.names, strict=True):
            if name in terms.means:
                values, weights = (each.detach().double() for each in terms.means[name])
                row += torch.stack([(values * weights).sum(), weights.sum()])

    def _add_gradient(self, span: range, x: Tensor, grad_logits: Tensor, grad_hidden: Tensor | None) -> None:
        if self.grad_rows is not None:
            part = self.grad_rows[span.start : span.stop]
            torch.mm(grad_logits, self._weight, out=part)
            if grad_hidden is not None:
                part += grad_hidden / self._arguments.task.group.size()
        if self.grad_weight is not None:
            self.grad_weight.add(grad_logits, x)
