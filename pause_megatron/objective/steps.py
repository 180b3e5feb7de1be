"""The rows of a micro-batch that an objective needs: for each target, the steps of its run of pauses. On the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Steps(NamedTuple):
    """Rows of a micro-batch by target. A named tuple, because DeepSpeed's hooks look for tensors in tuples only.

    Attributes:
        rows: Rows of the sequence-first flattening, int64 [rows]: all of the first target, then of the second, ...
        sizes: Rows of each target, at least 1, int64 [targets].
        is_pause: Whether the input token of each row is a pause, bool [rows].
        weights: Weight of each row in the objective, fp32 [rows].
        ends: Cumulative sum of `sizes`, int64 [targets], on the host.
        weight_sum: Sum of `weights`.
    """

    rows: Tensor
    sizes: Tensor
    is_pause: Tensor
    weights: Tensor
    ends: np.ndarray
    weight_sum: float

    def with_tensors(self, *tensors: Tensor) -> Steps:
        """Return the same rows with copies of the tensors, in their order."""
        rows, sizes, is_pause, weights = tensors
        return Steps(rows, sizes, is_pause, weights, self.ends, self.weight_sum)

    def without_targets(self) -> Steps:
        """Return the rows of no target."""
        none = self.with_tensors(self.rows[:0], self.sizes[:0], self.is_pause[:0], self.weights[:0])
        return none._replace(ends=self.ends[:0], weight_sum=0.0)

    def longest(self, numbers: range) -> int:
        """Return the rows of the longest run of some targets, at least one of them.

        Args:
            numbers: Targets one after the other.
        """
        ends = self.ends[numbers.start : numbers.stop]
        before = self.ends[numbers.start - 1] if numbers.start else 0
        return int(np.diff(ends, prepend=before).max())

    def spans(self, chunk: int) -> list[tuple[range, range]]:
        """Return chunks of at most `chunk` rows, or one run that is longer, as (targets, rows). No run is split.

        Args:
            chunk: Rows of logits that exist at one time.
        """
        spans, first, start = [], 0, 0
        while first < len(self.ends):
            last = max(int(self.ends.searchsorted(start + chunk, side="right")), first + 1)
            end = int(self.ends[last - 1])
            spans.append((range(first, last), range(start, end)))
            first, start = last, end
        return spans


def run_starts(is_pause: Tensor, segments: Tensor | None) -> Tensor:
    """Return the position at which the run of each position begins, int64 [batch, seq].

    A run is a text token and the pauses after it, within one segment: a text token begins one, and so does a pause at
    the beginning of a window or segment.

    Args:
        is_pause: Pauses among the input tokens, bool [batch, seq].
        segments: Segment of each token, [batch, seq]; None: each window is one.
    """
    begins = ~is_pause
    begins[:, 0] = True
    if segments is not None:
        begins[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    positions = torch.arange(is_pause.shape[1]).expand_as(is_pause)
    return torch.where(begins, positions, 0).cummax(dim=1).values


def collect(is_pause: Tensor, segments: Tensor | None, target_rows: Tensor, *, runs: bool) -> tuple[Tensor, Tensor]:
    """Return the rows of each target in order, int64 [rows], and their number by target, int64 [targets].

    Args:
        is_pause: As in `run_starts`.
        segments: As in `run_starts`.
        target_rows: Row that predicts each target, in the sequence-first flattening, int64 [targets].
        runs: Whether the rows of the whole run are needed; False: `target_rows` only.
    """
    if not runs:
        return target_rows, torch.ones_like(target_rows)
    batch = is_pause.shape[0]
    first = run_starts(is_pause, segments).t().reshape(-1)[target_rows]
    sizes = target_rows // batch - first + 1
    index = steps_of(sizes)[1]
    last = torch.repeat_interleave(target_rows, sizes)
    return last - (torch.repeat_interleave(sizes, sizes) - 1 - index) * batch, sizes


def steps_of(sizes: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the number of the target and the step of each row, int64 [rows] each.

    Args:
        sizes: Rows of each target, int64 [targets].
        total: Their sum, where the host knows it; then it does not wait for the device.
    """
    numbers = torch.repeat_interleave(sizes, output_size=total)
    starts = sizes.cumsum(0) - sizes
    return numbers, torch.arange(numbers.shape[0], device=sizes.device) - starts[numbers]
