"""The steps of a run, as a generator: what each did, for whoever wants to know."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pause_megatron.config.schema import OptimSection
from pause_megatron.data.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import sum_over_ranks
from pause_megatron.engine import Engine, learning_rate
from pause_megatron.train.losses import Losses, LossLedger
from pause_megatron.train.signals import StopRequest


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
        seconds: wall time from having the batch to the end of the step
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
    progress: Progress,
    stop: StopRequest,
    corpora: Sequence[str] = (),
) -> Iterator[StepResult]:
    """Takes optimizer steps until `total_steps` or a stop request.

    Args:
        engine: the model under DeepSpeed
        batches: (0-based step, this rank's micro-batches), starting at `progress.step`
        context: this rank's place
        optim: learning rate and schedule
        total_steps: steps of the whole run
        progress: where the run stands
        stop: read before each step; any rank's request stops all of them before it
        corpora: names of the corpora of a blend, whose losses are told apart
    """
    for step, micro_batches in batches:
        started = time.perf_counter()
        ledger = LossLedger(context.device, corpora)
        counts = [
            sum(batch.targets_count for batch in micro_batches),
            sum(batch.raw_tokens for batch in micro_batches),
            sum(batch.text_tokens for batch in micro_batches),
            int(bool(stop)),
        ]
        # Over all ranks, so that a stop request counts from any of them; tensor-parallel ranks see the same windows.
        *sums, stop_requests = sum_over_ranks(counts, context)
        if stop_requests:
            return
        targets, tokens, text_tokens = (int(value) // context.tp_size for value in sums)
        lr = learning_rate(optim, step + 1, total_steps)
        outcome = engine.train_step(
            [batch.to(context.device) for batch in micro_batches], ledger.forward, lr=lr, global_targets=targets
        )
        losses = ledger.totals(context)
        progress = Progress(step + 1, progress.tokens + tokens, progress.text_tokens + text_tokens)
        yield StepResult(
            progress=progress,
            losses=losses,
            grad_norm=outcome.grad_norm,
            lr=lr,
            applied=outcome.applied,
            tokens=tokens,
            text_tokens=text_tokens,
            seconds=time.perf_counter() - started,
            sample=micro_batches[0],
            last=step + 1 == total_steps,
        )
