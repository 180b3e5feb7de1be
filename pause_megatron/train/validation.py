"""Held-out loss: with pauses, without pauses, directly after a pause and elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.data.batches.loader import Samples
from pause_megatron.distributed import ParallelContext
from pause_megatron.train.losses import Losses, LossLedger, lm_loss


def evaluate_loss(
    module: nn.Module,
    dataset: Samples,
    samples: int,
    micro_size: int,
    pause_ids: range,
    context: ParallelContext,
    corpora: Sequence[str] = (),
) -> Losses:
    """Mean token losses over the first `samples` windows of a dataset. Every rank calls this; all get the same.

    Args:
        module: a `PauseGPTModel` or DeepSpeed's wrapper of one; left in training mode
        dataset: sample number -> sample
        samples: windows to score
        micro_size: windows per forward pass on one rank
        pause_ids: to tell pauses from text
        context: this rank's place
        corpora: names of the corpora of a blend, whose losses are told apart
    """
    ledger = LossLedger(context.device, corpora)
    module.eval()
    try:
        with torch.no_grad():
            for batch in _shares(dataset, samples, micro_size, pause_ids, context):
                batch = batch.to(context.device)
                ledger.enter(lm_loss(module, batch, 1.0).token_losses, batch.after_pause, batch.target_datasets)
    finally:
        module.train()
    return ledger.totals(context)


def validation_losses(with_pauses: Losses, without_pauses: Losses) -> dict[str, float | None]:
    """Names under which validation is logged; None for what does not exist (a loss after pauses without pauses)."""
    return {
        "valid_loss": with_pauses.mean,
        "valid_loss_after_pause": with_pauses.after_pause,
        "valid_loss_elsewhere": with_pauses.elsewhere,
        "valid_loss_without_pauses": without_pauses.mean,
        **{f"valid_loss/{name}": loss for name, loss in with_pauses.by_corpus.items()},
    }


def _shares(
    dataset: Samples, samples: int, micro_size: int, pause_ids: range, context: ParallelContext
) -> Iterator[MicroBatch]:
    """This rank's micro-batches: the same number on every rank, as ZeRO-3 and its collectives want it."""
    stride = micro_size * context.dp_size
    for first in range(0, samples, stride):
        start = first + context.dp_rank * micro_size
        mine = range(start, min(start + micro_size, samples))
        # A rank that has run out goes through the motions on a window that counts for nothing.
        numbers = mine or range(1)
        batch = collate([dataset[number] for number in numbers], sample_ids=numbers, pause_ids=pause_ids)
        yield batch if mine else _uncounted(batch)


def _uncounted(batch: MicroBatch) -> MicroBatch:
    empty: Mapping[str, torch.Tensor] = {
        name: getattr(batch, name)[:0] for name in ("target_rows", "targets", "after_pause")
    }
    return replace(batch, **empty)
