"""The training loop: a generator that takes optimizer steps and yields the result of each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from pause_megatron.config.schema import OptimSection, ScheduledConfig
from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import sum_over_ranks
from pause_megatron.engine import Engine, learning_rate
from pause_megatron.engine.waits import upload
from pause_megatron.objective import LossPlan
from pause_megatron.train.guards.signals import StopRequest
from pause_megatron.train.losses import Losses, LossSums

Metrics = Mapping[str, float | None]
"""Values by name; None for one that does not exist."""


@dataclass(frozen=True)
class Progress:
    """Counters of a run.

    Attributes:
        step: Optimizer steps, skipped ones included.
        tokens: Raw input tokens, pauses included.
        text_tokens: Input tokens that are not pauses.
    """

    step: int = 0
    tokens: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class StepSchedule:
    """The steps of a run and their learning rates.

    Attributes:
        optim: Peak learning rate and schedule.
        total_steps: Steps of the whole run.
        extended_from: Step at which the run that this one extends ended; None: it extends none.
    """

    optim: OptimSection
    total_steps: int
    extended_from: int | None = None

    @classmethod
    def of(cls, config: ScheduledConfig) -> StepSchedule:
        """Return the schedule of a configuration."""
        return cls(config.optim, config.train.steps, config.train.extended_from)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step; the first is 1."""
        return learning_rate(self.optim, step, self.total_steps, self.extended_from)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        progress: Counters of the run after this step.
        losses: Mean token losses over the global batch, in nats.
        grad_norm: Global L2 norm of the gradient before clipping.
        lr: Learning rate.
        applied: False when the gradient was not finite and the step was skipped.
        tokens: Raw tokens of this step, over all ranks.
        text_tokens: Text tokens of this step, over all ranks.
        seconds: Wall time from requesting the batch to the end of the step on the host. The device may still be busy
            with the optimizer's part, which the next step then waits for.
        loader_seconds: The part of `seconds` that waited for the batch.
        hook_seconds: Wall time between the previous step (or the start) and this one: logging, validation, saves. The
            sum of `seconds` and `hook_seconds` over all steps omits the hooks of the last step only.
        sample: This rank's first micro-batch, on the CPU.
        last: Whether the run is complete.
        metrics: Metrics that hooks returned for this step, such as held-out losses.
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
    metrics: Metrics = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of this step; the first is 1."""
        return self.progress.step

    def with_metrics(self, metrics: Metrics | None) -> StepResult:
        """Return this result with more metrics; None adds nothing."""
        return replace(self, metrics={**self.metrics, **metrics}) if metrics else self


def training_steps(
    engine: Engine,
    batches: Iterable[tuple[int, Sequence[MicroBatch]]],
    context: ParallelContext,
    schedule: StepSchedule,
    stop: StopRequest,
    *,
    progress: Progress = Progress(),
    corpora: Sequence[str] = (),
    long_hooks: Sequence[int] = (),
    hint_weight: float = 1.0,
    plan: LossPlan | None = None,
) -> Iterator[StepResult]:
    """Take optimizer steps until the last one or a stop request.

    The host waits for the device once per step, where the engine does: token counts, losses and stop requests are read
    together with the gradient norm. All ranks learn of a request while a step is being taken, and the next one is not
    begun. A request before the first step, or during a long hook, is agreed on separately, before another step begins.

    Args:
        engine: The model under DeepSpeed.
        batches: (0-based step, this rank's micro-batches), starting at `progress.step`.
        context: Process groups of this rank.
        schedule: Number of steps, and their learning rates.
        stop: Read in each step; a request on any rank stops all of them.
        progress: Counters of the run at the start.
        corpora: Names of the corpora of a blend, whose losses are reported separately.
        long_hooks: Intervals, in steps, of hooks that take long (validation, saves); the same on all ranks.
        hint_weight: Weight of a hint in the loss, where a token of an answer has weight 1.
        plan: What is minimized; None: the mean cross-entropy of the targets.

    Yields:
        The result of each step.
    """
    ended, remaining = time.perf_counter(), iter(batches)
    if any_rank_stops(stop, context):
        return
    while True:
        begun = time.perf_counter()
        try:
            step, micro_batches = next(remaining)
        except StopIteration:
            return
        loaded = time.perf_counter()
        lr = schedule.learning_rate(step + 1)
        sums = _StepSums(micro_batches, context, corpora, stop, hint_weight, plan)
        outcome = engine.train_step(
            [batch.to(context.device) for batch in micro_batches],
            sums.losses.forward,
            lr=lr,
            global_targets=sums.counts[0],
            read=sums.reduced,
        )
        tokens, text_tokens, stopping, losses = sums.parse(outcome.read)
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
            last=step + 1 == schedule.total_steps,
        )
        if stopping:
            return
        if any(every and (step + 1) % every == 0 for every in long_hooks) and any_rank_stops(stop, context):
            return


def any_rank_stops(stop: StopRequest, context: ParallelContext) -> bool:
    """Return whether any rank is asked to stop, the same on all of them; the host waits for the answer.

    Args:
        stop: This rank's request.
        context: Process groups of this rank.
    """
    return bool(sum_over_ranks([int(bool(stop))], context)[0])


class _StepSums:
    """Numbers of a step that are summed over all ranks on the device, and read by the host once.

    Attributes:
        counts: float64 [3] on the device, over all ranks: targets with their weights, raw tokens, text tokens.
        losses: Sums of the token losses.
    """

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        context: ParallelContext,
        corpora: Sequence[str],
        stop: StopRequest,
        hint_weight: float,
        plan: LossPlan | None,
    ) -> None:
        self._context, self._stop = context, stop
        self.losses = LossSums(context.device, corpora, hint_weight, plan)
        local = [
            (batch.weight + hint_weight * batch.hints_count, batch.raw_tokens, batch.text_tokens)
            for batch in micro_batches
        ]
        # Whole numbers stay exact in float64 up to 2**53.
        self.counts = upload([sum(each) for each in zip(*local, strict=True)], context.device)
        if context.world_size > 1:
            # Over the data-parallel group: tensor-parallel ranks read the same windows.
            dist.all_reduce(self.counts, group=context.dp_group)

    def reduced(self) -> Tensor:
        """Return counts, stop requests and sums of losses over all ranks: float64 [n] on the device.

        The engine calls this when all work of the step but the optimizer's is enqueued, so that a stop request counts
        until then.
        """
        stopping = upload([int(bool(self._stop))], self._context.device)
        if self._context.world_size > 1:
            dist.all_reduce(stopping)
        return torch.cat([self.counts, stopping, self.losses.reduced(self._context)])

    def parse(self, values: Sequence[float]) -> tuple[int, int, bool, Losses]:
        """Return raw tokens, text tokens, whether any rank is asked to stop, and losses, from `reduced` on the host."""
        _, tokens, text_tokens, stopping, *sums = values
        return int(tokens), int(text_tokens), bool(stopping), self.losses.means(sums)
