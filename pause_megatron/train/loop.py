"""The steps of a run, as a generator: what each did, for whoever wants to know."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pause_megatron.config.schema import OptimSection
from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import sum_over_ranks
from pause_megatron.engine import Engine, learning_rate
from pause_megatron.engine.waits import upload
from pause_megatron.train.guards.signals import StopRequest
from pause_megatron.train.losses import Losses, LossLedger


@dataclass(frozen=True)
class Progress:
    """What a run has seen so far.

    Attributes:
        step: optimizer steps, skipped ones included
        tokens: raw input tokens, pauses included
        text_tokens: input tokens that are not pauses
    """

    step: int = 0
    tokens: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        progress: the run's counters after this step
        losses: mean token losses over the global batch, in nats
        grad_norm: global L2 norm of the gradient before clipping
        lr: learning rate
        applied: False when the gradient was not finite and the step was skipped
        tokens, text_tokens: of this step, over all ranks
        seconds: wall time from asking for the batch to the end of the step on the host; the device may still be at the
            optimizer's part of it, which the next step then waits for
        loader_seconds: of these, waiting for the batch
        hook_seconds: wall time between the step before, or the start, and this one: what hooks took (logging,
            validation, saves). With `seconds` they leave nothing out but the hooks of the last step
        sample: this rank's first micro-batch, on the CPU
        last: the run is complete
        validation: held-out losses by name, None for one that does not exist; filled in by the validation hook, for the
            hooks after it
    """

    progress: Progress
    losses: Losses
    grad_norm: float
    lr: float
    applied: bool
    tokens: int
    text_tokens: int
    seconds: float
    loader_seconds: float
    hook_seconds: float
    sample: MicroBatch
    last: bool
    validation: dict[str, float | None] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of this step; the first is 1."""
        return self.progress.step


def training_steps(
    engine: Engine,
    batches: Iterable[tuple[int, Sequence[MicroBatch]]],
    context: ParallelContext,
    *,
    optim: OptimSection,
    total_steps: int,
    extended_from: int | None = None,
    progress: Progress,
    stop: StopRequest,
    corpora: Sequence[str] = (),
    long_hooks: Sequence[int] = (),
) -> Iterator[StepResult]:
    """Takes optimizer steps until `total_steps` or a stop request.

    The host waits for the device once a step, where the engine does: counts, losses and requests to stop are read with
    the gradient's norm. So a request is known to all ranks while a step is being taken, and the next one is not begun.
    One that came before the first step, or in a long hook, is agreed on by itself, and not even that step is begun.

    Args:
        engine: the model under DeepSpeed
        batches: (0-based step, this rank's micro-batches), starting at `progress.step`
        context: this rank's place
        optim: learning rate and schedule
        total_steps: steps of the whole run
        extended_from: the step at which the run that this one extends ended; see `learning_rate`
        progress: where the run stands
        stop: read in each step; any rank's request stops all of them
        corpora: names of the corpora of a blend, whose losses are told apart
        long_hooks: hooks take long after every so many steps (validation, saves); the same on all ranks
    """
    ended, waiting = time.perf_counter(), iter(batches)
    if _any_rank_asks(stop, context):
        return
    while True:
        begun = time.perf_counter()
        step, micro_batches = next(waiting, (None, ()))
        if step is None:
            return
        loaded = time.perf_counter()
        lr = learning_rate(optim, step + 1, total_steps, extended_from)
        numbers = _StepNumbers(micro_batches, context, corpora, stop)
        outcome = engine.train_step(
            [batch.to(context.device) for batch in micro_batches],
            numbers.ledger.forward,
            lr=lr,
            global_targets=numbers.counts[0],
            read=numbers.reduced,
        )
        tokens, text_tokens, asked, losses = numbers.given(outcome.read)
        progress = Progress(step + 1, progress.tokens + tokens, progress.text_tokens + text_tokens)
        before, ended = ended, time.perf_counter()
        yield StepResult(
            progress=progress,
            losses=losses,
            grad_norm=outcome.grad_norm,
            lr=lr,
            applied=outcome.applied,
            tokens=tokens,
            text_tokens=text_tokens,
            seconds=ended - begun,
            loader_seconds=loaded - begun,
            hook_seconds=begun - before,
            sample=micro_batches[0],
            last=step + 1 == total_steps,
        )
        if asked:
            return
        if any(every and (step + 1) % every == 0 for every in long_hooks) and _any_rank_asks(stop, context):
            return


def _any_rank_asks(stop: StopRequest, context: ParallelContext) -> bool:
    """Whether any rank is asked to stop; the same answer on all of them. The host waits for it."""
    return bool(sum_over_ranks([int(bool(stop))], context)[0])


class _StepNumbers:
    """Numbers of a step that all ranks add up on the device, and that the host reads once.

    Attributes:
        counts: float64 [3] on the device, over all ranks: targets, raw tokens, text tokens
        ledger: sums of the token losses
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatch], context: ParallelContext, corpora: Sequence[str], stop: StopRequest
    ) -> None:
        self._context, self._stop = context, stop
        self.ledger = LossLedger(context.device, corpora)
        mine = [(batch.targets_count, batch.raw_tokens, batch.text_tokens) for batch in micro_batches]
        # Whole numbers stay exact in float64 up to 2**53.
        self.counts = upload([sum(each) for each in zip(*mine, strict=True)], context.device)
        if context.world_size > 1:
            # Over the ranks that see different windows: tensor-parallel ranks see the same ones.
            dist.all_reduce(self.counts, group=context.dp_group)

    def reduced(self) -> Tensor:
        """Everything that the host wants to know, float64 [n] on the device: counts, requests to stop, sums of losses.

        Called when all work of the step but the optimizer's is on its way, so that a request may come as late as that.
        """
        asking = upload([int(bool(self._stop))], self._context.device)
        if self._context.world_size > 1:
            dist.all_reduce(asking)
        return torch.cat([self.counts, asking, self.ledger.reduced(self._context)])

    def given(self, values: Sequence[float]) -> tuple[int, int, bool, Losses]:
        """Raw tokens, text tokens, whether any rank is asked to stop, losses: from the numbers of `reduced`."""
        _, tokens, text_tokens, asking, *sums = values
        return int(tokens), int(text_tokens), bool(asking), self.ledger.losses(sums)
