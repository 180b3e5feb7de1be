"""Token losses summed over micro-batches and ranks, split by whether the model had just paused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pause_megatron.data.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import sum_over_data_parallel
from pause_megatron.model.attention import segment_mask


@dataclass(frozen=True)
class Losses:
    """Mean token losses in nats, over supervised targets; nan where there are none.

    Attributes:
        mean: over all targets
        after_pause: over targets that stand directly after a pause, so that they are predicted from it
        elsewhere: over the other targets. A model that uses its pauses predicts worse elsewhere than after them.
        targets: number of targets
        after_pause_targets: number of targets directly after a pause
    """

    mean: float
    after_pause: float
    elsewhere: float
    targets: int
    after_pause_targets: int

    @classmethod
    def from_sums(cls, total: float, after_pause: float, targets: float, after_pause_targets: float) -> Losses:
        """From sums of token losses and counts of targets."""
        others = targets - after_pause_targets
        return cls(
            mean=total / targets if targets else math.nan,
            after_pause=after_pause / after_pause_targets if after_pause_targets else math.nan,
            elsewhere=(total - after_pause) / others if others else math.nan,
            targets=int(targets),
            after_pause_targets=int(after_pause_targets),
        )


def lm_loss(module: nn.Module, batch: MicroBatch, scale: float):
    """Runs a `PauseGPTModel` (or DeepSpeed's wrapper of one) on a micro-batch: `LMLoss`, with loss = scale x sum."""
    mask = None if batch.segments is None else segment_mask(batch.segments, batch.prefix)
    return module(
        batch.tokens,
        batch.position_ids,
        attention_mask=mask,
        target_rows=batch.target_rows,
        targets=batch.targets,
        loss_scale=scale,
    )


class LossLedger:
    """Sums of the token losses that a rank has seen. Stays on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def forward(self, module: nn.Module, batch: MicroBatch, scale: float) -> Tensor:
        """The scaled loss of a micro-batch, for `Engine.train_step`; its token losses are entered here."""
        output = lm_loss(module, batch, scale)
        self.enter(output.token_losses, batch.after_pause)
        return output.loss

    def enter(self, token_losses: Tensor, after_pause: Tensor) -> None:
        """Adds token losses [R], fp32; `after_pause` [R] marks those predicted from a pause."""
        losses = token_losses.double()
        self._sums += torch.stack(
            [losses.sum(), (losses * after_pause).sum(), losses.new_tensor(losses.numel()), after_pause.sum().double()]
        )

    def totals(self, context: ParallelContext) -> Losses:
        """Means over all ranks. Every rank calls this."""
        return Losses.from_sums(*sum_over_data_parallel(self._sums.tolist(), context))
