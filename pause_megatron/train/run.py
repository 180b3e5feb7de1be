"""A run that is ready to train: its folder, checkpoint store, model and engine, and how they are set up."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pause_megatron.checkpoint import Store
from pause_megatron.config.batching import batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.lora import lora_of
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.data.batches.loader import StepLoader
from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.settings import threads_for_optimizer
from pause_megatron.engine import Engine
from pause_megatron.model import PauseGPTModel, Vocabulary, build_model, parameter_groups, train_pause_rows_only
from pause_megatron.objective import loss_plan
from pause_megatron.train.guards.own_code import changed_sources, own_sources
from pause_megatron.train.guards.ownership import Ownership, own_run
from pause_megatron.train.guards.signals import StopRequest, deadline
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.inputs.streaming import Stream
from pause_megatron.train.logs.monitoring import log_end, log_start
from pause_megatron.train.loop import Progress
from pause_megatron.train.start.start import Start, find_start

log = logging.getLogger(__name__)

EXIT_FINISHED = 0
EXIT_STOPPED = 75  # EX_TEMPFAIL: asked to stop, checkpoint saved, the same command resumes


@dataclass
class Run:
    """A run on this rank, from the moment when its model and engine are ready. Made by `open_run`.

    Attributes:
        config: Configuration of the run.
        data: What the run trains on.
        context: Process groups of this rank.
        stop: Requests to stop.
        deadline: When the run must stop for its job to end in time, seconds since the epoch; None: no deadline.
        owner: Tells whether the run folder is still this job's.
        store: The run's checkpoints.
        start: What the run started from.
        vocabulary: Text, pause and padding rows of the model.
        engine: The model under DeepSpeed.
        stream: Windows of `data.source`; None where `data.train` holds them.
        progress: Counters after the last step.
        sources: Digests of the user's modules, as this run has imported them.
        saved_step: Step of the checkpoint that was saved last; None before the first save.
    """

    config: ScheduledConfig
    data: TrainingData
    context: ParallelContext
    stop: StopRequest
    deadline: float | None
    owner: Ownership
    store: Store
    start: Start
    vocabulary: Vocabulary
    engine: Engine
    stream: Stream | None
    progress: Progress
    sources: Mapping[str, str] = field(default_factory=dict)
    saved_step: int | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are taken."""
        return self.progress.step >= self.config.train.steps

    @property
    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None: there is none."""
        return self.start.resumed_from if self.saved_step is None else self.store.path(self.saved_step)


@contextmanager
def open_run(config: ScheduledConfig, data: TrainingData, context: ParallelContext, stop: StopRequest) -> Iterator[Run]:
    """Own the run folder, find where the run starts, and build model, engine and stream from there.

    Every rank calls this.

    Args:
        config: Configuration of the run.
        data: What the run trains on.
        context: Process groups of this rank.
        stop: Requests to stop.

    Yields:
        The run, until the body ends.

    Raises:
        ConfigError: Another job trains in the run folder, or the job's time is nearly over.
        CheckpointError: As `find_start`.
    """
    end = deadline(config.checkpoint.before_end_seconds)
    folder = Path(config.run.dir)
    with ExitStack() as closing:
        owner = closing.enter_context(own_run(folder, context))
        store = Store(folder / "checkpoints", context.rank, context.world_size)
        start = find_start(store, config, data, context)
        sources = own_sources(config)
        if start.resumed_from and context.rank == 0 and (line := changed_sources(start.resumed_from, config, sources)):
            log.warning(line)
        # run.start_over is a permission for this start only: the run's config.yaml must not repeat it.
        config = config.model_copy(update={"run": config.run.model_copy(update={"start_over": False})})
        model = new_model(config, data, draw=start.checkpoint is None)
        shards = start.load_weights(model, context)
        # Frozen weights must not decay either.
        groups = parameter_groups(model, 0.0 if config.train.only else config.optim.weight_decay)
        engine = closing.enter_context(new_engine(config, model, groups, context))
        start.load_state(engine, shards)
        if context.rank == 0:
            plan, stage = batch_plan(config, context.world_size), engine.deepspeed.zero_optimization_stage()
            log_start(config, plan, model.vocabulary.size, stage, context, data.description)
        stream = closing.enter_context(data.stream(context, start.resumed_from)) if data.stream else None
        yield Run(
            config=config,
            data=data,
            context=context,
            stop=stop,
            deadline=end,
            owner=owner,
            store=store,
            start=start,
            vocabulary=model.vocabulary,
            engine=engine,
            stream=stream,
            progress=start.progress,
            sources=sources,
        )


def finish(run: Run) -> int:
    """Log what the run has seen and where it is saved, and return its exit code.

    Args:
        run: A run whose steps are taken.

    Returns:
        EXIT_FINISHED or EXIT_STOPPED.
    """
    stopped = not run.is_complete
    if run.context.rank == 0:
        log_end(run.progress, stopped, run.stop.reason, run.newest_checkpoint)
    return EXIT_STOPPED if stopped else EXIT_FINISHED


def new_model(config: ResolvedConfig, data: TrainingData, *, draw: bool = True) -> PauseGPTModel:
    """Return this rank's shard of the model.

    Args:
        config: Configuration of the run.
        data: What the run trains on; its vocabulary is the model's.
        draw: Whether the initial weights are drawn; False: they are about to be loaded.
    """
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
        auxiliary_heads=data.auxiliary_heads,
        lora=lora_of(config),
        objective=None if (plan := loss_plan(config.objective)) is None else plan.objective,
        given_positions=config.pause.positions == "shared",
    )
    if config.train.only is not None:
        train_pause_rows_only(model)
    return model


def new_engine(
    config: ResolvedConfig, model: nn.Module, groups: Sequence[dict[str, Any]], context: ParallelContext
) -> Engine:
    """Return a DeepSpeed engine over a model.

    Args:
        config: Configuration of the run.
        model: This rank's shard of the model.
        groups: Optimizer parameter groups, as in `Engine`.
        context: Process groups of this rank.
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
    """Return the loader of this rank's batches, which reads ahead of the steps.

    Args:
        config: Configuration of the run.
        data: What the run trains on.
        context: Process groups of this rank.
        progress: Counters of the run; the first batch is of the next step.
        stream: Windows of `data.source`; None where `data.train` holds them.
        end: Last step; None: the run's last.
    """
    windows = data.train if stream is None else stream.dataset
    if windows is None:
        raise AssertionError("expected the training windows in data.train or in a stream, got neither")
    sampler = StepSampler(config.batch.global_size, config.batch.micro_size, context.dp_rank, context.dp_size)
    return StepLoader(
        windows,
        sampler,
        progress.step,
        config.train.steps if end is None else end,
        config.data.prefetch,
        pause_ids=data.pause_ids,
        device=context.device,
        plan=loss_plan(config.objective),
    )
