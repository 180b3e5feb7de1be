"""Token losses summed over micro-batches and ranks, split by whether the model had just paused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.model.spans import TextSpans


@dataclass(frozen=True)
class Losses:
    """Mean token losses in nats, over supervised targets.

    Attributes:
        mean: over all targets; nan where there are none
        after_pause: over targets that stand directly after a pause, so that they are predicted from it; None: there are
            none
        elsewhere: over the other targets; None: there are none. A model that uses its pauses predicts worse elsewhere
            than after them.
        targets: number of targets
        after_pause_targets: number of targets directly after a pause
        by_corpus: mean over the targets of each corpus of a blend, by its name, None where it has none; empty for one
            corpus
    """

    mean: float
    after_pause: float | None
    elsewhere: float | None
    targets: int
    after_pause_targets: int
    by_corpus: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_sums(
        cls,
        total: float,
        after_pause: float,
        targets: float,
        after_pause_targets: float,
        by_corpus: dict[str, tuple[float, float]] | None = None,
    ) -> Losses:
        """From sums of token losses and counts of targets; `by_corpus` likewise, (sum, count) of each."""
        others, mean = targets - after_pause_targets, _mean(total, targets)
        return cls(
            mean=math.nan if mean is None else mean,
            after_pause=_mean(after_pause, after_pause_targets),
            elsewhere=_mean(total - after_pause, others),
            targets=int(targets),
            after_pause_targets=int(after_pause_targets),
            by_corpus={name: _mean(*sums) for name, sums in (by_corpus or {}).items()},
        )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def lm_loss(module: nn.Module, batch: MicroBatch, scale: Tensor | float):
    """Runs a `PauseGPTModel` (or DeepSpeed's wrapper of one) on a micro-batch: `LMLoss`, with loss = scale x sum."""
    spans = None
    if batch.segments is not None:
        spans = TextSpans.of(batch.segments, batch.prefix, device=batch.tokens.device)
    return module(
        batch.tokens,
        batch.position_ids,
        attention_mask=spans,
        target_rows=batch.target_rows,
        targets=batch.targets,
        loss_scale=scale,
    )


class LossLedger:
    """Sums of the token losses that a rank has seen. Stays on the device until it is read.

    Args:
        device: of the token losses
        corpora: names of the corpora of a blend, in the order of their dataset_id; empty for one corpus
    """

    def __init__(self, device: torch.device, corpora: Sequence[str] = ()) -> None:
        self._corpora = corpora
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._of_corpora = torch.zeros(len(corpora), 2, dtype=torch.float64, device=device)

    def forward(self, module: nn.Module, batch: MicroBatch, scale: Tensor) -> Tensor:
        """The scaled loss of a micro-batch, for `Engine.train_step`; its token losses are entered here."""
        output = lm_loss(module, batch, scale)
        self.enter(output.token_losses, batch.after_pause, batch.target_datasets)
        return output.loss

    def enter(self, token_losses: Tensor, after_pause: Tensor, datasets: Tensor | None = None) -> None:
        """Adds token losses [R], fp32.

        Args:
            token_losses: fp32 [R]
            after_pause: bool [R], those predicted from a pause
            datasets: int64 [R], the number of their corpus in the blend
        """
        losses = token_losses.double()
        count = losses.new_full((), losses.numel())  # a kernel, where new_tensor would be a copy that waits
        self._sums += torch.stack([losses.sum(), (losses * after_pause).sum(), count, after_pause.sum().double()])
        if self._corpora and datasets is not None:
            # Not index_add: on a GPU it adds in another order every time.
            mine = datasets == torch.arange(len(self._corpora), device=datasets.device)[:, None]
            self._of_corpora += torch.stack([(mine * losses).sum(1), mine.sum(1).double()], dim=1)

    def reduced(self, context: ParallelContext) -> Tensor:
        """The sums over all ranks, float64 [n] on the device, for `losses`. Every rank calls this; nothing waits."""
        sums = torch.cat([self._sums, self._of_corpora.flatten()])
        if context.world_size > 1:
            dist.all_reduce(sums, group=context.dp_group)
        return sums

    def losses(self, sums: Sequence[float]) -> Losses:
        """Means, from the numbers of `reduced`."""
        pairs = zip(sums[4::2], sums[5::2], strict=True)
        return Losses.from_sums(*sums[:4], dict(zip(self._corpora, pairs, strict=True)))

    def totals(self, context: ParallelContext) -> Losses:
        """Means over all ranks. Every rank calls this, and waits."""
        return self.losses(self.reduced(context).tolist())
