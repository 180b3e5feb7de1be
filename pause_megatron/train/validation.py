"""Validation: held-out loss with pauses, without pauses, directly after a pause and elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.distributed import ParallelContext
from pause_megatron.objective import LossPlan
from pause_megatron.train.inputs.inputs import HeldOut
from pause_megatron.train.loop import Metrics
from pause_megatron.train.losses import Losses, LossSums, lm_loss

Goes = Callable[[int, int], bool]
"""Called after each micro-batch with (windows done, windows of this pass); False on every rank ends the validation."""


def always(done: int, total: int) -> bool:
    """Return True: the validation is not ended early."""
    return True


class _Ended(Exception):
    """The validation is to end before its last window."""


def validate(
    module: nn.Module,
    with_pauses: HeldOut,
    without_pauses: HeldOut | None,
    micro_size: int,
    pause_ids: range,
    context: ParallelContext,
    plan: LossPlan | None = None,
    goes_on: Goes = always,
) -> Metrics:
    """Return the held-out losses by the names under which they are logged. Every rank calls this; all get the same.

    Args:
        module: A `PauseGPTModel`, or DeepSpeed's wrapper of one; left in training mode.
        with_pauses: Held-out windows with pauses.
        without_pauses: Held-out windows without pauses; not scored again where they are those of `with_pauses`.
        micro_size: Windows per forward pass on one rank.
        pause_ids: The K pause ids.
        context: Process groups of this rank.
        plan: What is minimized; None: the mean cross-entropy of the targets.
        goes_on: Reports progress, and ends the validation, which then has no losses.
    """
    options = (micro_size, pause_ids, context, plan, goes_on)
    try:
        paused = evaluate_loss(module, with_pauses, *options)
        if without_pauses is None or without_pauses.windows is with_pauses.windows:
            return validation_losses(paused, paused)
        return validation_losses(paused, evaluate_loss(module, without_pauses, *options))
    except _Ended:
        return {}


def evaluate_loss(
    module: nn.Module,
    held_out: HeldOut,
    micro_size: int,
    pause_ids: range,
    context: ParallelContext,
    plan: LossPlan | None = None,
    goes_on: Goes = always,
) -> Losses:
    """Return the mean token losses over held-out windows. Every rank calls this; all get the same.

    Args:
        module: A `PauseGPTModel`, or DeepSpeed's wrapper of one; left in training mode.
        held_out: The windows.
        micro_size: Windows per forward pass on one rank.
        pause_ids: The K pause ids.
        context: Process groups of this rank.
        plan: As in `validate`.
        goes_on: As in `validate`.
    """
    sums = LossSums(context.device, held_out.names, plan=plan)
    module.eval()
    try:
        with torch.no_grad():
            batches = _micro_batches(held_out, micro_size, pause_ids, context, plan)
            for number, batch in enumerate(batches, start=1):
                batch = batch.to(context.device)
                sums.add_output(lm_loss(module, batch, 1.0), batch)
                done = min(number * micro_size * context.dp_size, held_out.count)
                if done < held_out.count and not goes_on(done, held_out.count):
                    raise _Ended
    finally:
        module.train()
    return sums.totals(context)


def validation_losses(with_pauses: Losses, without_pauses: Losses) -> Metrics:
    """Return held-out losses by the names under which they are logged.

    Args:
        with_pauses: Losses on windows with pauses.
        without_pauses: Losses on windows without pauses.
    """
    return {
        "valid_loss": with_pauses.mean,
        "valid_loss_after_pause": with_pauses.after_pause,
        "valid_loss_elsewhere": with_pauses.elsewhere,
        "valid_loss_without_pauses": without_pauses.mean,
        **({} if with_pauses.hints is None else {"valid_loss_hints": with_pauses.hints}),
        **{f"valid_{name}": value for name, value in with_pauses.of_objective().items()},
        **{f"valid_loss/{name}": loss for name, loss in with_pauses.by_corpus.items()},
    }


def _micro_batches(
    held_out: HeldOut, micro_size: int, pause_ids: range, context: ParallelContext, plan: LossPlan | None
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches: the same number on every rank, because ZeRO-3 runs collectives in each."""
    stride = micro_size * context.dp_size
    for first in range(0, held_out.count, stride):
        start = first + context.dp_rank * micro_size
        own = range(start, min(start + micro_size, held_out.count))
        numbers = own or range(1)  # a rank without windows left runs a dummy batch without targets
        windows = [held_out.windows[number] for number in numbers]
        batch = collate(windows, sample_ids=numbers, pause_ids=pause_ids, plan=plan)
        yield batch if own else _without_targets(batch)


def _without_targets(batch: MicroBatch) -> MicroBatch:
    return replace(
        batch,
        target_rows=batch.target_rows[:0],
        targets=batch.targets[:0],
        after_pause=batch.after_pause[:0],
        hint_rows=None,
        hint_targets=None,
        hints_by_head=(),
        steps=None if batch.steps is None else batch.steps.without_targets(),
    )
