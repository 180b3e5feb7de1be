"""A run from its data to its last checkpoint: the stages that pretraining and finetuning share, in their order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from pause_megatron.checkpoint import Store
from pause_megatron.config.batching import batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.load import dump
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.data.batches.loader import StepLoader
from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.settings import threads_for_optimizer
from pause_megatron.engine import Engine
from pause_megatron.model import (
    PauseGPTModel,
    Vocabulary,
    build_model,
    parameter_groups,
    train_pause_rows_only,
)
from pause_megatron.terminal.output import lost_output
from pause_megatron.train.guards.ownership import WhileOwner, own_run
from pause_megatron.train.guards.signals import StopRequest, deadline
from pause_megatron.train.guards.watch import HangWatch
from pause_megatron.train.hooks import Every, Hook, SkipLimit, Unfailing
from pause_megatron.train.inputs.inputs import HeldOut, TrainingData
from pause_megatron.train.inputs.streaming import Stream
from pause_megatron.train.logs.metrics_file import MetricsFile, Throughput
from pause_megatron.train.logs.monitoring import ConfigFile, ProgressBar, announce, conclude
from pause_megatron.train.logs.tensorboard import TensorBoard
from pause_megatron.train.loop import Progress, StepResult, training_steps
from pause_megatron.train.losses import Losses
from pause_megatron.train.saving import CheckpointSaver
from pause_megatron.train.start.start import find_start
from pause_megatron.train.validation import evaluate_loss, validation_losses

log = logging.getLogger(__name__)

EXIT_FINISHED = 0
EXIT_STOPPED = 75  # EX_TEMPFAIL: asked to stop, checkpoint saved, the same command goes on
SKIPPED_STEPS_IN_A_ROW = 10


def train(config: ScheduledConfig, data: TrainingData, context: ParallelContext, stop: StopRequest) -> int:
    """Trains on `data` until `train.steps` or a request to stop. Every rank calls this.

    Args:
        config: a resolved configuration, its number of steps known
        data: what to train on
        context: this rank's place in the process groups
        stop: read in each step

    Returns:
        EXIT_FINISHED or EXIT_STOPPED.
    """
    folder, result = Path(config.run.dir), None
    end = deadline(config.checkpoint.before_end_seconds)
    with ExitStack() as closing:
        owner = closing.enter_context(own_run(folder, context))
        store = Store(folder / "checkpoints", context.rank, context.world_size)
        start = find_start(store, config, data, context)
        # Permission to start over is for this start, not for those that read the run's config.yaml.
        config = config.model_copy(update={"run": config.run.model_copy(update={"start_over": False})})
        model = new_model(config, data, draw=start.draws)
        start.weights_into(model)
        # What must not move must not decay either.
        groups = parameter_groups(model, 0.0 if config.train.only else config.optim.weight_decay)
        engine = closing.enter_context(new_engine(config, model, groups, context))
        start.state_into(engine)
        progress = start.progress
        if context.rank == 0:
            plan, stage = batch_plan(config, context.world_size), engine.deepspeed.zero_optimization_stage()
            announce(config, plan, model.vocabulary.size, stage, context, data.description)
        stream = closing.enter_context(data.stream(context, start.folder)) if data.stream else None
        saver = CheckpointSaver(config, engine, data, store, context, stream, owner)
        closing.enter_context(saver.naming_the_newest())
        hooks: list[Hook] = [SkipLimit(SKIPPED_STEPS_IN_A_ROW)]
        # A step is validated, then logged, then saved, so that a checkpoint never precedes its log.
        if data.valid is not None:
            hooks.append(Every(config.validation.every, _validate(config, engine, data, context)))
        if context.rank == 0:
            hooks += [WhileOwner(each, owner, stop) for each in _monitors(config, engine, data, context, progress)]
        hooks.append(Every(config.checkpoint.every, saver, on_stop=True))
        closing.callback(_say_what_is_lost, hooks)
        for hook in hooks:
            closing.callback(hook.close)
        batches = closing.enter_context(step_loader(config, data, context, progress, stream))
        watch = closing.enter_context(HangWatch(config.run.hang_seconds, context))
        closing.enter_context(stop.during_steps(end))
        for result in training_steps(
            engine,
            batches,
            context,
            optim=config.optim,
            total_steps=config.train.steps,
            extended_from=config.train.extended_from,
            progress=progress,
            stop=stop,
            corpora=data.names,
            long_hooks=(config.checkpoint.every, config.validation.every),
        ):
            watch.beat(f"step {result.step} done")
            for hook in hooks:
                hook(result)
                watch.beat(f"step {result.step} done, and hooks after it")
        progress = progress if result is None else result.progress
        stopped = progress.step < config.train.steps
        if stopped and result is not None:
            for hook in hooks:
                hook.stop(result)
    if context.rank == 0:
        conclude(progress, stopped, stop.reason, start.folder if saver.newest is None else store.path(saver.newest))
    return EXIT_STOPPED if stopped else EXIT_FINISHED


def _say_what_is_lost(hooks: Sequence[Hook]) -> None:
    for line in [*filter(None, (hook.lost() for hook in hooks)), *lost_output()]:
        log.warning(line)


def new_model(config: ResolvedConfig, data: TrainingData, *, draw: bool = True) -> PauseGPTModel:
    """This rank's shard, with its initial weights; `draw=False`: with none yet, because they are about to be loaded."""
    model = build_model(
        config.model,
        vocabulary=Vocabulary(data.tokenizer.vocab_size, tuple(data.pause_ids)),
        sequence_length=config.data.sequence_length,
        parallel=config.parallel,
        softmax=config.pause.softmax,
        precision=config.engine.precision,
        seed=config.run.seed,
        kernels=config.engine.kernels,
        draw=draw,
    )
    if config.train.only == "pause_rows":
        train_pause_rows_only(model)
    return model


def new_engine(config: ResolvedConfig, model: nn.Module, groups: Sequence[dict], context: ParallelContext) -> Engine:
    """A DeepSpeed engine for a model, as a configuration wants it.

    Args:
        groups: optimizer parameter groups, as in `Engine`.
    """
    ds_config = deepspeed_config(config, data_parallel=context.dp_size)
    threads_for_optimizer(ds_config, context)
    return Engine(
        model,
        groups=groups,
        ds_config=ds_config,
        optim=config.optim,
        mpu=context.mpu,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
    )


def step_loader(
    config: ScheduledConfig,
    data: TrainingData,
    context: ParallelContext,
    progress: Progress,
    stream: Stream | None,
    *,
    end: int | None = None,
) -> StepLoader:
    """This rank's batches of the steps after `progress`, read ahead, to step `end`; default: the run's last."""
    sampler = StepSampler(config.batch.global_size, config.batch.micro_size, context.dp_rank, context.dp_size)
    return StepLoader(
        data.train if stream is None else stream.dataset,
        sampler,
        progress.step,
        config.train.steps if end is None else end,
        config.data.prefetch,
        pause_ids=data.pause_ids,
        device=context.device,
    )


def _validate(config: ScheduledConfig, engine: Engine, data: TrainingData, context: ParallelContext):
    def score(held_out: HeldOut) -> Losses:
        module, micro = engine.deepspeed, config.batch.micro_size
        return evaluate_loss(module, held_out.windows, held_out.count, micro, data.pause_ids, context, held_out.names)

    def validate(result: StepResult) -> None:
        with_pauses = score(data.valid)
        same = data.valid_without_pauses.windows is data.valid.windows
        without_pauses = with_pauses if same else score(data.valid_without_pauses)
        result.validation.update(validation_losses(with_pauses, without_pauses))

    return validate


def _monitors(
    config: ScheduledConfig, engine: Engine, data: TrainingData, context: ParallelContext, progress: Progress
) -> list[Hook]:
    """What tells of the run; none of it can end it."""
    folder, log = Path(config.run.dir), config.log
    throughput = Throughput.of(config, engine.module.vocabulary.size, context)
    place = folder / "metrics.jsonl"
    metrics = Unfailing(place, "lines", MetricsFile(place, throughput, progress.step))
    monitors: list[Hook] = [
        Unfailing(folder / "config.yaml", "times", ConfigFile(folder / "config.yaml", config)),
        Unfailing("progress", "steps", ProgressBar(config.train.steps, progress.step)),
        Every(log.every, metrics),
    ]
    if log.tensorboard:
        place = folder / "tensorboard"
        board = TensorBoard(place, throughput, resume_after=progress.step, config_yaml=dump(config), show=data.show)
        monitors.append(Every(log.every, Unfailing(place, "steps", board)))
        if log.samples_every:
            samples = Unfailing(f"{place}: samples of text", "windows", board.show_sample)
            monitors.append(Every(log.samples_every, samples, at_end=False))
    return monitors
