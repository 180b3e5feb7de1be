"""Pause-pretraining (Goyal et al., ICLR 2024, section 3.1): train on the windows of a corpus or a stream."""

from __future__ import annotations

from functools import partial

from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import scheduled
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.data.batches.loader import Samples
from pause_megatron.data.corpus.corpora import Corpora, open_corpora
from pause_megatron.data.windows.build import DatasetOptions, Datasets, build_datasets
from pause_megatron.data.windows.dataset import PauseTokenizer
from pause_megatron.data.windows.split_text import require_text
from pause_megatron.distributed import initialize
from pause_megatron.distributed.agreement import failing_together
from pause_megatron.distributed.context import started_ranks
from pause_megatron.distributed.settings import settings_of
from pause_megatron.terminal.output import tolerant_output
from pause_megatron.train.guards.same_run import corpora_record, run_record
from pause_megatron.train.guards.signals import StopRequest, stop_signals
from pause_megatron.train.guards.watch import collective_timeout
from pause_megatron.train.inputs.cache_folder import with_cache_folder
from pause_megatron.train.inputs.inputs import HeldOut, TrainingData
from pause_megatron.train.inputs.streaming import open_stream
from pause_megatron.train.run import finish, open_run
from pause_megatron.train.training import train


def pretrain(config: ResolvedConfig, stop: StopRequest | None = None) -> int:
    """Train until `train.steps` or a stop request, resuming from the newest complete checkpoint of `run.dir`.

    Args:
        config: A resolved configuration.
        stop: A stop request whose signal handlers are installed; None: they are installed here.

    Returns:
        EXIT_FINISHED, or EXIT_STOPPED after one of `signals.STOP_SIGNALS`, SIGINT, or when the job's time is
        nearly over.

    Raises:
        PauseMegatronError: A configuration, corpus or checkpoint cannot be used, before any training starts; a
            checkpoint cannot be written; gradients stay not finite.
    """
    run_config, connect_seconds = scheduled(config), config.run.connect_seconds
    with (
        tolerant_output(),
        stop_signals(stop) as stop,
        settings_of(config),
        failing_together("pretrain", connect_seconds),
    ):
        corpora = open_corpora(config.data, config.pause.embeddings)  # a missing corpus fails before the rendezvous
        same = run_record("pretrain", config, started_ranks()) | corpora_record(corpora)
        timeout = collective_timeout(config)
        with initialize(config.parallel, timeout=timeout, connect_seconds=connect_seconds, same=same) as context:
            data = corpus_data(run_config, context.world_size, context.rank, corpora)
            with open_run(run_config, data, context, stop) as run:  # checkpoint or initial weights, model, engine
                train(run)
            return finish(run)


def corpus_data(
    config: ScheduledConfig, world_size: int, rank: int = 0, corpora: Corpora | None = None
) -> TrainingData:
    """Return the windows of `data.prefix`, or of `data.source`. Every rank calls this: rank 0 builds the index caches.

    Args:
        config: Configuration of the run.
        world_size: Ranks in all.
        rank: Rank of this process.
        corpora: The opened corpora; None: they are opened here.

    Raises:
        PauseMegatronError: A corpus is damaged or holds too little text, or the index caches cannot be written.
    """
    corpora = open_corpora(config.data, config.pause.embeddings) if corpora is None else corpora
    if corpora.corpora or corpora.valid:
        require_text(  # before a large corpus is verified
            *([corpus.prefix for corpus in part] for part in (corpora.corpora, corpora.valid)),
            split=config.data.split,
            sequence_length=config.data.sequence_length,
            pause=config.pause,
            validates=bool(config.validation.every),
        )
        config = with_cache_folder(config, (corpora.corpora or corpora.valid)[0].prefix)
    corpora.verify(config.data, rank)
    datasets = _datasets(config, corpora)
    corpora.require_unchanged()
    plan = batch_plan(config, world_size)

    def held_out(windows: Samples | None) -> HeldOut | None:
        return None if windows is None else HeldOut(windows, config.validation.samples, datasets.valid_names)

    return TrainingData(
        train=datasets.train,
        valid=held_out(datasets.valid),
        valid_without_pauses=held_out(datasets.valid_without_pauses),
        tokenizer=corpora.tokenizer,
        pause_ids=datasets.tokenizer.pause_ids,
        fingerprint=corpora.fingerprint,
        description=f"{plan.raw_tokens:,} raw tokens (about {plan.text_tokens:,.0f} of text)",
        show=lambda batch: corpora.show(batch.tokens[0].tolist()),
        names=datasets.train_names,
        stream=partial(open_stream, config, corpora.tokenizer) if config.data.source else None,
    )


def _datasets(config: ScheduledConfig, corpora: Corpora) -> Datasets:
    if config.data.source and not config.data.valid_prefix:
        return Datasets(None, None, None, (), (), PauseTokenizer(corpora.tokenizer, config.pause.embeddings))
    return build_datasets(
        DatasetOptions(
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
            intra_document_masking=config.data.intra_document_masking,
            eod_mask_loss=config.data.eod_mask_loss,
            read_cache=config.data.verify == "always",
            side=config.data.side,
            side_weights=config.objective.token_weights == "side",
            samples_before=(config.train.extended_from or 0) * config.batch.global_size,
        )
    )
