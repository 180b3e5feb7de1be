"""Pause-pretraining (Goyal et al., ICLR 2024, section 3.1), from process groups to the last checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from pause_megatron.checkpoint import Store, restore_engine, restore_masters, restore_weights, save
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.load import dump
from pause_megatron.config.plan import batch_plan
from pause_megatron.config.schema import RunConfig
from pause_megatron.data.build import Datasets, build_datasets
from pause_megatron.data.corpora import Corpora, open_corpora
from pause_megatron.data.dataset import PauseTokenizer
from pause_megatron.data.loader import StepLoader
from pause_megatron.data.sampler import StepSampler
from pause_megatron.distributed import ParallelContext, initialize
from pause_megatron.engine import Engine
from pause_megatron.model import (
    PauseGPTModel,
    Vocabulary,
    build_model,
    parameter_groups,
    train_pause_rows_only,
)
from pause_megatron.train.hooks import Every, Hook, SkipLimit
from pause_megatron.train.initial import load_initial_weights
from pause_megatron.train.loop import Progress, StepResult, training_steps
from pause_megatron.train.monitoring import MetricsFile, ProgressBar, TensorBoard, Throughput, announce, conclude
from pause_megatron.train.resume import find_resume, progress_record
from pause_megatron.train.signals import StopRequest
from pause_megatron.train.streaming import Stream
from pause_megatron.train.validation import evaluate_loss, validation_losses

EXIT_FINISHED = 0
EXIT_STOPPED = 75  # EX_TEMPFAIL: asked to stop, checkpoint saved, the same command goes on
SKIPPED_STEPS_IN_A_ROW = 10


def pretrain(config: RunConfig) -> int:
    """Trains until `train.steps` or a stop signal, going on from the newest complete checkpoint of `run.dir`.

    Args:
        config: a resolved configuration

    Returns:
        EXIT_FINISHED, or EXIT_STOPPED after SIGTERM, SIGINT or SIGUSR2.

    Raises:
        PauseMegatronError: a configuration, corpus or checkpoint that cannot be used, before any training starts;
            a checkpoint that cannot be written; gradients that stay not finite.
    """
    with initialize(config.parallel) as context, StopRequest() as stop, ExitStack() as closing:
        corpora = open_corpora(config.data, config.pause.embeddings)
        corpora.verify(config.data)
        datasets = _datasets(config, corpora)
        model = _model(config, datasets)
        store = Store(Path(config.run.dir) / "checkpoints", context.rank, context.world_size)
        resumed = find_resume(store, config, corpora.fingerprint, context)
        initial = None
        if resumed:
            restore_weights(model, resumed.reader)
        elif config.model.from_:
            initial = load_initial_weights(model, config, corpora.tokenizer, context)
        engine = closing.enter_context(_engine(config, model, context))
        if resumed:
            restore_engine(engine, resumed.reader)
        elif initial:
            restore_masters(engine, initial)
        progress = resumed.progress if resumed else Progress()
        if context.rank == 0:
            plan = batch_plan(config, context.world_size)
            announce(config, plan, model.vocabulary.size, engine.deepspeed.zero_optimization_stage(), context)
        stream = None
        if config.data.source:
            stream = Stream(config, corpora.tokenizer, context, resumed.reader.folder if resumed else None)
            closing.enter_context(stream)
        hooks = _hooks(config, engine, datasets, corpora, store, context, progress, stream)
        for hook in hooks:
            closing.callback(hook.close)
        batches = closing.enter_context(_batches(config, datasets, context, progress, stream))
        for result in training_steps(
            engine,
            batches,
            context,
            optim=config.optim,
            total_steps=config.train.steps,
            progress=progress,
            stop=stop,
            corpora=datasets.train_names,
        ):
            for hook in hooks:
                hook(result)
            progress = result.progress
        stopped = progress.step < config.train.steps
    if context.rank == 0:
        conclude(progress, stopped)
    return EXIT_STOPPED if stopped else EXIT_FINISHED


def _datasets(config: RunConfig, corpora: Corpora) -> Datasets:
    if config.data.source and not config.data.valid_prefix:
        return Datasets(None, None, None, (), (), PauseTokenizer(corpora.tokenizer, config.pause.embeddings))
    return build_datasets(
        config.data.prefix,
        valid_prefix=config.data.valid_prefix,
        split=config.data.split,
        sequence_length=config.data.sequence_length,
        tokenizer=corpora.tokenizer,
        pause=config.pause,
        seed=config.run.seed,
        train_samples=config.train.steps * config.batch.global_size,
        valid_samples=config.validation.samples if config.validation.every else 0,
        cache=config.data.cache,
    )


def _model(config: RunConfig, datasets: Datasets) -> PauseGPTModel:
    model = build_model(
        config.model,
        vocabulary=Vocabulary(datasets.tokenizer.text_size, datasets.tokenizer.pause_ids),
        sequence_length=config.data.sequence_length,
        parallel=config.parallel,
        softmax=config.pause.softmax,
        precision=config.engine.precision,
        seed=config.run.seed,
    )
    if config.train.only == "pause_rows":
        train_pause_rows_only(model)
    return model


def _engine(config: RunConfig, model: PauseGPTModel, context: ParallelContext) -> Engine:
    return Engine(
        model,
        # What must not move must not decay either.
        groups=parameter_groups(model, 0.0 if config.train.only else config.optim.weight_decay),
        ds_config=deepspeed_config(config, data_parallel=context.dp_size),
        optim=config.optim,
        mpu=context.mpu,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
    )


def _batches(
    config: RunConfig, datasets: Datasets, context: ParallelContext, progress: Progress, stream: Stream | None
) -> StepLoader:
    sampler = StepSampler(config.batch.global_size, config.batch.micro_size, context.dp_rank, context.dp_size)
    return StepLoader(
        datasets.train if stream is None else stream.dataset,
        sampler,
        progress.step,
        config.train.steps,
        config.data.prefetch,
        pause_ids=datasets.tokenizer.pause_ids,
    )


def _hooks(
    config: RunConfig,
    engine: Engine,
    datasets: Datasets,
    corpora: Corpora,
    store: Store,
    context: ParallelContext,
    progress: Progress,
    stream: Stream | None,
) -> list[Hook]:
    """In this order: a step is validated, then logged, then saved, so that a checkpoint never precedes its log."""
    hooks: list[Hook] = [SkipLimit(SKIPPED_STEPS_IN_A_ROW)]
    if datasets.valid is not None:
        hooks.append(Every(config.validation.every, _validate(config, engine, datasets, context)))
    if context.rank == 0:
        hooks += _monitors(config, engine, corpora, context, progress)
    saving = _save(config, engine, corpora, store, context, stream)
    hooks.append(Every(config.checkpoint.every, saving, on_stop=True))
    return hooks


def _validate(config: RunConfig, engine: Engine, datasets: Datasets, context: ParallelContext):
    def score(dataset):
        return evaluate_loss(
            engine.deepspeed,
            dataset,
            config.validation.samples,
            config.batch.micro_size,
            datasets.tokenizer.pause_ids,
            context,
            datasets.valid_names,
        )

    def validate(result: StepResult) -> None:
        with_pauses = score(datasets.valid)
        same = datasets.valid_without_pauses is datasets.valid
        without_pauses = with_pauses if same else score(datasets.valid_without_pauses)
        result.validation.update(validation_losses(with_pauses, without_pauses))

    return validate


def _monitors(
    config: RunConfig, engine: Engine, corpora: Corpora, context: ParallelContext, progress: Progress
) -> list[Hook]:
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    throughput = Throughput.of(config, engine.module.vocabulary.size, context)
    monitors: list[Hook] = [
        ProgressBar(config.train.steps, progress.step),
        Every(config.log.every, MetricsFile(folder / "metrics.jsonl", throughput, progress.step)),
    ]
    if config.log.tensorboard:
        board = TensorBoard(
            folder / "tensorboard", throughput, resume_after=progress.step, config_yaml=dump(config), show=corpora.show
        )
        monitors.append(Every(config.log.every, board))
        if config.log.samples_every:
            monitors.append(Every(config.log.samples_every, board.show_sample, at_end=False))
    return monitors


def _save(
    config: RunConfig,
    engine: Engine,
    corpora: Corpora,
    store: Store,
    context: ParallelContext,
    stream: Stream | None,
):
    def save_checkpoint(result: StepResult) -> None:
        save(
            store,
            engine,
            context,
            step=result.step,
            corpus=corpora.fingerprint,
            progress=progress_record(result.progress),
            config_yaml=dump(config),
            save_tokenizer=corpora.tokenizer.save,
            keep=config.checkpoint.keep,
            extra=stream.files(result.step) if stream else {},
        )

    return save_checkpoint
