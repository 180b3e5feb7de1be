"""The steps of a run with its hooks: validation, then logs, then checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from pause_megatron.config.load import dump
from pause_megatron.objective import loss_plan
from pause_megatron.terminal.output import lost_output
from pause_megatron.train.guards.ownership import WhileOwner
from pause_megatron.train.guards.watch import HangWatch
from pause_megatron.train.hooks import BestEffort, Every, Hook, SkippedStepLimit, WeightlessSteps
from pause_megatron.train.inputs.inputs import HeldOut
from pause_megatron.train.logs.metrics_file import MetricsFile, Throughput
from pause_megatron.train.logs.monitoring import ConfigFile, ProgressBar
from pause_megatron.train.logs.tensorboard import TensorBoard
from pause_megatron.train.loop import Metrics, StepResult, StepSchedule, any_rank_stops, training_steps
from pause_megatron.train.run import Run, step_loader
from pause_megatron.train.saving import CheckpointSaver, naming_last_checkpoint
from pause_megatron.train.validation import validate

log = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""Consecutive steps with a gradient that is not finite, at which a run ends."""


def train(run: Run) -> None:
    """Take optimizer steps until `train.steps` or a stop request. Every rank calls this.

    Args:
        run: The run; its `progress` and `saved_step` are updated.

    Raises:
        PauseMegatronError: A checkpoint cannot be written, data cannot be read, or gradients stay not finite.
    """
    config = run.config
    with ExitStack() as closing:
        closing.enter_context(naming_last_checkpoint(run))
        hooks = closing.enter_context(open_hooks(run))
        batches = closing.enter_context(step_loader(config, run.data, run.context, run.progress, run.stream))
        watch = closing.enter_context(HangWatch(config.run.hang_seconds, run.context))
        closing.enter_context(run.stop.during_steps(run.deadline))
        result: StepResult | None = None
        for result in training_steps(
            run.engine,
            batches,
            run.context,
            StepSchedule.of(config),
            run.stop,
            progress=run.progress,
            corpora=run.data.names,
            long_hooks=(config.checkpoint.every, config.validation.every),
            hint_weight=config.finetune.hint_weight,
            plan=loss_plan(config.objective),
        ):
            watch.beat(f"step {result.step} done")
            for hook in hooks:
                result = result.with_metrics(hook(result))
                watch.beat(f"step {result.step} done, and hooks after it")
            run.progress = result.progress
        if result is not None and not run.is_complete:
            for hook in hooks:
                hook.on_stop(result)


@contextmanager
def open_hooks(run: Run) -> Iterator[list[Hook]]:
    """Open the hooks of a run, in the order in which each step runs them.

    A step is validated, then logged, then saved, so that no checkpoint is ahead of the logs.

    Args:
        run: The run.

    Yields:
        The hooks of this rank; they are closed when the body ends, and what they could not write is logged.
    """
    config = run.config
    hooks: list[Hook] = [SkippedStepLimit(MAX_SKIPPED_STEPS), WeightlessSteps()]
    with ExitStack() as closing:
        closing.callback(_log_failures, hooks)
        if run.data.valid is not None:
            hooks.append(Every(config.validation.every, _Validation(run, run.data.valid)))
        if run.context.rank == 0:
            hooks += [WhileOwner(monitor, run.owner, run.stop) for monitor in _monitors(run)]
        hooks.append(Every(config.checkpoint.every, CheckpointSaver(run), on_stop=True))
        for hook in hooks:
            closing.callback(hook.close)
        yield hooks


def _log_failures(hooks: Sequence[Hook]) -> None:
    for line in [*filter(None, (hook.failure() for hook in hooks)), *lost_output()]:
        log.warning(line)


class _Validation:
    """Validation on the held-out windows of a run, which returns their losses.

    A stop request ends it early: the step is saved without them, as the time until a kill may be short.
    """

    _SECONDS_BETWEEN_LINES = 30.0
    _BATCHES_BETWEEN_LOOKS = 8  # a look waits for all ranks

    def __init__(self, run: Run, held_out: HeldOut) -> None:
        self._run, self._held_out = run, held_out
        self._plan = loss_plan(run.config.objective)
        self._batches, self._last_line = 0, 0.0

    def __call__(self, result: StepResult) -> Metrics:
        run = self._run
        self._batches, self._last_line = 0, time.monotonic()
        return validate(
            run.engine.deepspeed,
            self._held_out,
            run.data.valid_without_pauses,
            run.config.batch.micro_size,
            run.data.pause_ids,
            run.context,
            self._plan,
            self._goes_on,
        )

    def _goes_on(self, done: int, total: int) -> bool:
        self._batches += 1
        if time.monotonic() - self._last_line > self._SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info(f"validation: {done:,} of {total:,} windows")
        if self._batches % self._BATCHES_BETWEEN_LOOKS or not any_rank_stops(self._run.stop, self._run.context):
            return True
        log.info(f"validation ends after {done:,} of {total:,} windows, without its losses: a stop is requested")
        return False


def _monitors(run: Run) -> list[Hook]:
    """Return the hooks that record and show steps, on rank 0; none of them can end the run."""
    config, logging_keys, done = run.config, run.config.log, run.progress.step
    throughput = Throughput.of(config, run.vocabulary.size, run.context)
    config_file, metrics_file = run.folder / "config.yaml", run.folder / "metrics.jsonl"
    monitors: list[Hook] = [
        BestEffort(config_file, "times", ConfigFile(config_file, config)),
        BestEffort("progress", "steps", ProgressBar(config.train.steps, done)),
        Every(logging_keys.every, BestEffort(metrics_file, "lines", MetricsFile(metrics_file, throughput, done))),
    ]
    if logging_keys.tensorboard:
        place = run.folder / "tensorboard"
        board = TensorBoard(place, throughput, resume_after=done, config_yaml=dump(config), show=run.data.show)
        monitors.append(Every(logging_keys.every, BestEffort(place, "steps", board)))
        if logging_keys.samples_every:
            samples = BestEffort(f"{place}: samples of text", "windows", board.show_sample)
            monitors.append(Every(logging_keys.samples_every, samples, at_end=False))
    return monitors
