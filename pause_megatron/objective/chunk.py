"""A chunk of rows as an objective sees it: vocabulary-parallel functions of the logits, and their gradient.

Objectives need the logits through few numbers a row: logits of some ids, and log-normalizers. These are computed
without autograd and given to the objective as leaves. The gradient of the logits is then written once, from the
gradients of the leaves, so that a chunk needs about as much memory as the cross-entropy does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pause_megatron.objective.steps import steps_of


class Columns(NamedTuple):
    """Columns of this rank's logits.

    Attributes:
        first: Id of the first column.
        pauses: Columns of pause ids that are here.
        pause_ids: All K pause ids; the first of them is the request.
        group: Tensor-parallel ranks, which have the other columns.
    """

    first: int
    pauses: Sequence[int]
    pause_ids: Sequence[int]
    group: dist.ProcessGroup


class _Picked(NamedTuple):
    """Logits of ids, one a row.

    Attributes:
        ids: The ids, which their owner may change later.
        version: Version of the ids when the logits were picked.
        local: Columns of this shard, int64 [rows, 1].
        here: Whether the ids are in this shard, bool [rows].
        leaf: The logits, fp32 [rows].
    """

    ids: Tensor
    version: int
    local: Tensor
    here: Tensor
    leaf: Tensor


class Chunk:
    """Rows of whole runs. All tensors but the shard's logits are the same on all tensor-parallel ranks.

    Args:
        logits: This rank's columns, [rows, columns]; masked ones are -inf.
        hidden: Input of the LM head, [rows, hidden].
        targets: Target ids, int64 [targets].
        sizes: Rows of each target, int64 [targets].
        is_pause: As `Steps`, of these rows.
        weights: As `Steps`, of these rows.
        longest: Rows of the longest run.
        columns: Which columns `logits` has.
        differentiable: Whether `gradient` will be called.

    Attributes:
        count: Number of targets in the chunk.
        number: Number of the row's target in the chunk, int64 [rows].
        targets: Target id of each row, int64 [rows].
        index: Step of each row in its run, int64 [rows].
        length: Rows of the row's run, int64 [rows].
        is_last: Whether a row is the last of its run, bool [rows].
        is_pause: Whether a row's input token is a pause, bool [rows].
        weights: Weight of each row, as `Objective.weights` returned it, fp32 [rows].
        longest: Rows of the longest run.
    """

    def __init__(
        self,
        logits: Tensor,
        hidden: Tensor,
        *,
        targets: Tensor,
        sizes: Tensor,
        is_pause: Tensor,
        weights: Tensor,
        longest: int,
        columns: Columns,
        differentiable: bool,
    ) -> None:
        self.count, self.longest = targets.shape[0], longest
        self.number, self.index = steps_of(sizes, logits.shape[0])
        self.targets, self.length = targets[self.number], sizes[self.number]
        self.is_last = self.index == self.length - 1
        self.is_pause, self.weights = is_pause, weights
        self._logits, self._columns, self._differentiable = logits, columns, differentiable
        self._hidden = hidden.detach().requires_grad_(differentiable)
        self._shard: Tensor | None = None
        self._picked: list[_Picked] = []
        self._normalizers: dict[bool, Tensor] = {}

    @property
    def hidden(self) -> Tensor:
        """Hidden states before the LM head, [rows, hidden]."""
        return self._hidden

    @property
    def request_id(self) -> int:
        """Id of the first pause, whose logit is a request for another step."""
        return self._columns.pause_ids[0]

    @property
    def shard(self) -> Tensor:
        """This rank's columns of the logits, fp32 [rows, columns], for functions that are not here.

        What is computed from it goes through `all_sum`, and what goes into that beside it through `for_columns`.
        """
        if self._shard is None:
            self._shard = self._leaf(self._logits.float())
        return self._shard

    def all_sum(self, values: Tensor) -> Tensor:
        """Return the sum over tensor-parallel ranks of what each computed from its `shard`, differentiable.

        Args:
            values: A tensor of one shape on all ranks.
        """
        total: Tensor = _SumOverRanks.apply(values, self._columns.group)
        return total

    def for_columns(self, values: Tensor) -> Tensor:
        """Return values for a computation with `shard`: their gradient is summed over tensor-parallel ranks.

        Args:
            values: A tensor that is the same on all ranks, such as a log-normalizer.
        """
        copy: Tensor = _CopyToRanks.apply(values, self._columns.group)
        return copy

    def logit(self, ids: Tensor | int) -> Tensor:
        """Return the logit of an id at each row, fp32 [rows].

        Args:
            ids: int64 [rows], or one id, of the vocabulary.
        """
        if isinstance(ids, int):
            ids = torch.full_like(self.targets, ids)
        if ids is not self.targets:  # without a look at the device: an id that no rank has would have the logit 0
            total = self._logits.shape[1] * self._columns.group.size()
            torch._assert_async(((ids >= 0) & (ids < total)).all(), f"chunk.logit: expected ids from 0 to {total - 1}")
        for known in self._picked:
            if known.ids is ids and known.version == ids._version:
                return known.leaf
        local, here = self._local(ids)
        values = torch.where(here, self._logits.gather(1, local).squeeze(1).float(), 0.0)
        if self._columns.group.size() > 1:
            dist.all_reduce(values, group=self._columns.group)
        self._picked.append(_Picked(ids, ids._version, local, here, self._leaf(values)))
        return self._picked[-1].leaf

    def log_normalizer(self, *, pauses: bool = True) -> Tensor:
        """Return the logarithm of the softmax denominator at each row, fp32 [rows].

        Args:
            pauses: Whether pause logits are in it, where `pause.softmax` keeps them; False: text only.
        """
        if pauses not in self._normalizers:
            self._normalizers[pauses] = self._leaf(self._log_sum_exp(pauses))
        return self._normalizers[pauses]

    def log_probability(self, ids: Tensor, *, pauses: bool = True) -> Tensor:
        """Return the log-probability of an id at each row, fp32 [rows].

        Args:
            ids: int64 [rows].
            pauses: As in `log_normalizer`.
        """
        return self.logit(ids) - self.log_normalizer(pauses=pauses)

    def by_target(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Arrange values of rows as [targets, longest run], step by step, with `fill` after the end of a run.

        Args:
            values: [rows].
            fill: Value where a run has no such step.
        """
        empty = values.new_full((self.count, self.longest), fill)
        return empty.index_put((self.number, self.index), values)

    def last(self, values: Tensor) -> Tensor:
        """Return the value at the last step of each target, [targets].

        Args:
            values: [rows].
        """
        empty = values.new_zeros(self.count + 1)  # the rows before the last write to an entry that is cut off
        return empty.index_put((torch.where(self.is_last, self.number, self.count),), values)[: self.count]

    def gradient(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of a scalar for this rank's logits and for the hidden states.

        Args:
            value: What the terms of this chunk add up to, times a scale.

        Returns:
            [rows, columns], and [rows, hidden] of the hidden states' direct use, or None. Both in their own type.
        """
        leaves = [*self._normalizers.values(), *(each.leaf for each in self._picked)]
        direct = [self._hidden] if self._shard is None else [self._hidden, self._shard]
        found: list[Tensor | None] = [None] * (len(direct) + len(leaves))
        if value.requires_grad:
            found = list(torch.autograd.grad(value, [*direct, *leaves], allow_unused=True))
        of_hidden, of_shard = found[0], found[1] if len(direct) == 2 else None
        found = found[len(direct) :]
        total = torch.zeros_like(self._logits, dtype=torch.float32) if of_shard is None else of_shard.clone()
        for (pauses, normalizer), slope in zip(self._normalizers.items(), found, strict=False):
            if slope is not None:
                total += self._softmax(normalizer.detach(), pauses).mul_(slope.unsqueeze(1))
        for each, slope in zip(self._picked, found[len(self._normalizers) :], strict=True):
            if slope is not None:
                values = total.gather(1, each.local) + torch.where(each.here, slope, 0.0).unsqueeze(1)
                total.scatter_(1, each.local, values)
        return total.to(self._logits.dtype), of_hidden

    def _leaf(self, values: Tensor) -> Tensor:
        return values.detach().requires_grad_(self._differentiable)

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns of this shard [rows, 1], and whether the ids are here [rows]."""
        columns, local = self._logits.shape[1], ids - self._columns.first
        here = (local >= 0) & (local < columns)
        return local.clamp(0, columns - 1).unsqueeze(1), here

    def _log_sum_exp(self, pauses: bool) -> Tensor:
        logits = self._without_pauses(self._logits.float(), float("-inf"), pauses)
        highest, group = logits.amax(dim=1), self._columns.group
        if group.size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        total = (logits - highest.unsqueeze(1)).exp_().sum(dim=1)
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        return total.log() + highest

    def _softmax(self, normalizer: Tensor, pauses: bool) -> Tensor:
        softmax = (self._logits.float() - normalizer.unsqueeze(1)).exp_()
        for column in () if pauses else self._columns.pauses:
            softmax[:, column] = 0.0
        return softmax

    def _without_pauses(self, logits: Tensor, value: float, pauses: bool) -> Tensor:
        if pauses or not self._columns.pauses:
            return logits
        logits = logits.clone()
        for column in self._columns.pauses:
            logits[:, column] = value
        return logits


class _SumOverRanks(torch.autograd.Function):
    """Sum over tensor-parallel ranks, whose result all use alike: the gradient of each rank's part is the result's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _CopyToRanks(torch.autograd.Function):
    """Identity, where each tensor-parallel rank computes a part from the values: their gradient is the sum of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(gradient, ctx.group), None
