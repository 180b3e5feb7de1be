"""Where a run starts: its own newest checkpoint, the weights of another checkpoint, or random initialization."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from pause_megatron.checkpoint import MergedReader, ShardReader, Store, load_weights, restore_engine, restore_masters
from pause_megatron.config.schema import ScheduledConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.model import PauseGPTModel
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.loop import Progress
from pause_megatron.train.start.initial_weights import check_trains_all, find_initial_weights, merging_reader
from pause_megatron.train.start.resume import find_checkpoint
from pause_megatron.train.start.start_over import check_no_lost_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, if any, and how much of it is restored.

    There is one restore path, whatever the topology that wrote the checkpoint: `load_weights` before DeepSpeed wraps
    the model, then `load_state` into the engine.

    Attributes:
        checkpoint: Folder of the checkpoint; None: random initialization.
        resumes: Whether the checkpoint is the run's own, so that moments, optimizer step and counters are restored.
        progress: Counters of the run at the start.
    """

    checkpoint: Path | None = None
    resumes: bool = False
    progress: Progress = field(default_factory=Progress)

    @property
    def resumed_from(self) -> Path | None:
        """The run's own checkpoint; None for a run at step 0."""
        return self.checkpoint if self.resumes else None

    def load_weights(self, model: PauseGPTModel, context: ParallelContext) -> ShardReader | None:
        """Copy this rank's shard of the weights into a fresh model, before DeepSpeed wraps it.

        DeepSpeed partitions, casts and copies the weights in ways that differ by ZeRO stage: built from the right
        weights, all of its copies are right.

        Args:
            model: This rank's shard of the model.
            context: Process groups of this rank.

        Returns:
            The reader for `load_state`; None for random initialization.

        Raises:
            CheckpointError: The checkpoint is of another model.
        """
        if self.checkpoint is None:
            return None
        reader = MergedReader(self.checkpoint) if self.resumes else merging_reader(self.checkpoint)
        live = model.vocabulary.size
        rank, ranks = context.tp_rank, context.tp_size
        return load_weights(model, reader, live_rows=live, rank=rank, ranks=ranks, own=self.resumes)

    def load_state(self, engine: Engine, shards: ShardReader | None) -> None:
        """Copy the fp32 master weights into the engine, and in a resumed run Adam's moments and step.

        Args:
            engine: The engine over the model that `load_weights` filled.
            shards: What `load_weights` returned.
        """
        if shards is None:
            return
        if self.resumes:
            restore_engine(engine, shards)
        else:
            restore_masters(engine, shards)


def find_start(store: Store, config: ScheduledConfig, data: TrainingData, context: ParallelContext) -> Start:
    """Return where the run starts: its newest complete checkpoint, else `model.from`, else random initialization.

    Every rank calls this; all get the same.

    Args:
        store: The run's checkpoints.
        config: Configuration of the run.
        data: What the run trains on; its fingerprint must be that of the checkpoint.
        context: Process groups of this rank.

    Raises:
        CheckpointError: A checkpoint is damaged, or of another run or model, whose differences are named; or the run
            had checkpoints, which are gone.
        ConfigError: `train.extended_from` is set and the run has no checkpoint, or `train.only` is set and there are
            no weights to keep.
    """
    found = find_checkpoint(store, config, data.fingerprint, context)
    if found is not None:
        if config.run.start_over and context.rank == 0:
            note = "run.start_over=true has no effect beside a complete checkpoint. To restart from step 1, choose"
            log.warning(f"{note} another run.dir, or move {store.folder} away")
        return Start(found.folder, resumes=True, progress=found.progress)
    check_no_lost_checkpoint(config, store.folder, context)
    if config.model.from_ is not None:
        return Start(find_initial_weights(config.model.from_, config, data.tokenizer, context))
    check_trains_all(config)
    return Start()
