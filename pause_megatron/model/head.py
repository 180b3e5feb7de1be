"""The LM head: logits and cross-entropy for the rows that have a target, a chunk of rows at a time.

Goyal et al. (ICLR 2024, section 3) leave out every position whose next token is a pause. Such rows never reach this
head, so nothing is computed for them. The rows that do are worked through in chunks, and the gradients of a chunk are
taken at once, in the forward pass, so that logits exist for one chunk at a time (the pattern of torchtitan's chunked
loss). The cross-entropy itself is `pause_megatron.model.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn

from pause_megatron.config.presets import head_chunk_rows
from pause_megatron.model.kernels import Kernels

Spans = list[tuple[int, int]]


class LMLoss(NamedTuple):
    """What the model says about its targets.

    A named tuple, because DeepSpeed's hooks look for tensors in tuples only.

    Attributes:
        loss: scalar fp32, loss_scale * sum; the one that is differentiable.
        sum: scalar fp32, sum of the token losses in nats.
        count: number of targets.
        token_losses: [targets] fp32, in the order of the targets.
    """

    loss: Tensor
    sum: Tensor
    count: int
    token_losses: Tensor


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """megatron-core's output layer that can go on to the loss.

    The loss is taken inside this module's `forward`, because ZeRO-3 gathers a module's weight for its forward only.

    Args:
        masked: columns of this rank's shard that take no part in the softmax.
        chunk: rows of logits that exist at one time; None: by memory.
        kernels: compute the cross-entropy.
        embedding: module whose weight is used, for tied embeddings; else None. It is kept out of this module's
            children, so that the weight has one name in a checkpoint.
        linear: arguments of ColumnParallelLinear.
    """

    def __init__(
        self,
        *sizes: int,
        masked: Spans,
        chunk: int | None,
        kernels: Kernels,
        embedding: nn.Module | None,
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
    ) -> tuple[Any, ...]:
        """Logits, or the loss.

        Args:
            input_: [seq, batch, hidden] without targets; [rows, hidden] with.
            weight: as in ColumnParallelLinear; default: its own or the tied one.
            runtime_gather_output: as in ColumnParallelLinear.
            targets: [rows] int64, ids that take part in the softmax. (A target on a masked column has an infinite
                loss.)
            loss_scale: scalar fp32. None: the token losses are differentiable one by one, and all logits exist.

        Returns:
            Without targets (logits, bias), as ColumnParallelLinear. With targets and a scale: (scaled sum, sum, token
            losses [rows]). With targets only: (token losses [rows],).
        """
        if weight is None and self.weight is None:
            # Read here and not by the caller: ZeRO-3 then gathers the shared weight for this module.
            weight = self._tied_to[0].weight
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if loss_scale is None:
            logits = mask_columns(torch.matmul(input_, weight.t()), self.masked)
            return (tensor_parallel.vocab_parallel_cross_entropy(logits, targets),)
        chunk = head_chunk_rows(
            self.chunk, columns=weight.shape[0], element=weight.element_size(), device=weight.device.type
        )
        task = _Task(self._cross_entropy, self.masked, chunk, self.tp_group, torch.is_grad_enabled())
        return _ChunkedCrossEntropy.apply(input_, weight, targets, loss_scale, task)


def mask_columns(logits: Tensor, masked: Spans) -> Tensor:
    """Set columns of [..., vocabulary shard] logits to -inf; the same tensor where there are none."""
    if not masked:
        return logits
    dead = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    for start, stop in masked:
        dead[start:stop] = True
    return logits.masked_fill(dead, float("-inf"))


class _Task(NamedTuple):
    """What `_ChunkedCrossEntropy` is told besides tensors."""

    cross_entropy: Callable[..., tuple[Tensor, Tensor | None]]
    masked: Spans
    chunk: int
    group: dist.ProcessGroup
    differentiable: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of vocabulary-parallel cross-entropies, with gradients taken chunk by chunk in the forward pass.

    rows [rows, hidden] are the same on all ranks of the group, weight [vocabulary shard, hidden] is this rank's. The
    gradient of rows is this rank's part of the sum over the vocabulary: who made the rows adds the parts up.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, chunk = rows.shape[0], task.chunk
        token_losses = torch.empty(count, dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if task.differentiable and ctx.needs_input_grad[0] else None
        grad_weight = None
        if task.differentiable and ctx.needs_input_grad[1]:
            grad_weight = _WeightGradient(weight, chunks=-(-count // chunk))
        # One buffer for all chunks: on a CPU, fresh pages for each cost more than the softmax.
        buffer = rows.new_empty(min(chunk, count), weight.shape[0])
        for start in range(0, count, chunk):
            x = rows[start : start + chunk]
            logits = torch.mm(x, weight.t(), out=buffer[: x.shape[0]])
            for low, high in task.masked:
                logits[:, low:high] = float("-inf")
            token_losses[start : start + chunk], grad_logits = task.cross_entropy(
                logits, targets[start : start + chunk], scale, task.group, task.differentiable
            )
            if grad_rows is not None:
                torch.mm(grad_logits, weight, out=grad_rows[start : start + chunk])
            if grad_weight is not None:
                grad_weight.add(grad_logits, x)
        ctx.gradients = grad_rows, None if grad_weight is None else grad_weight.result()
        total = token_losses.sum()
        ctx.mark_non_differentiable(total, token_losses)
        ctx.set_materialize_grads(False)
        return scale * total, total, token_losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the LM head was differentiated twice; it keeps its gradients for one backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None


class _WeightGradient:
    """Sum of the chunks' weight gradients, in fp32 and rounded once at the end; of a single chunk, the very product.

    Args:
        weight: [vocabulary shard, hidden].
        chunks: how many will be added.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self._weight, self._sum = weight, None
        self._wide = chunks > 1 and weight.dtype != torch.float32

    def add(self, grad_logits: Tensor, rows: Tensor) -> None:
        """Add grad_logits^T rows: [rows, vocabulary shard], [rows, hidden] -> [vocabulary shard, hidden]."""
        left, result = grad_logits.t(), {}
        if self._wide and left.is_cuda:
            result = {"out_dtype": torch.float32}
        elif self._wide:  # a CPU makes no product of another type than its factors
            left, rows = left.float(), rows.float()
        if self._sum is None:
            self._sum = torch.mm(left, rows, **result)
        else:
            torch.addmm(self._sum, left, rows, out=self._sum, **result)

    def result(self) -> Tensor:
        """The gradient, in the weight's type; zeros where no row had a target."""
        if self._sum is None:
            return torch.zeros_like(self._weight)
        return self._sum.to(self._weight.dtype)
