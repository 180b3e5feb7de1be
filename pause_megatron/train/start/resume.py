"""Going on: which checkpoint, and whether it is of this run."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, fields
from pathlib import Path

from pause_megatron.checkpoint import (
    CheckpointReader,
    Manifest,
    MergedReader,
    ShardReader,
    Store,
    load_weights,
    restore_engine,
    restore_weights,
)
from pause_megatron.checkpoint.verify import no_report
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.load import load
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.errors import CheckpointError
from pause_megatron.model import PauseGPTModel
from pause_megatron.terminal.progress import StageProgress
from pause_megatron.train.loop import Progress
from pause_megatron.train.start.extension import config_differences, how_to_extend

log = logging.getLogger(__name__)


class Resumed:
    """A checkpoint to go on from, whatever world wrote it.

    Args:
        folder: a complete checkpoint
        manifest: its manifest
        context: this rank's place

    Attributes:
        progress: how far it had come
        folder: the checkpoint
        draws: as `Start`
    """

    draws = False

    def __init__(self, folder: Path, manifest: Manifest, context: ParallelContext) -> None:
        self.progress = _progress(folder, manifest)
        self.folder, self._manifest, self._context = folder, manifest, context
        self._reader: CheckpointReader | ShardReader | None = None

    def weights_into(self, model: PauseGPTModel) -> None:
        """Copies this rank's weights into a fresh model, before DeepSpeed sees it."""
        rank, ranks = self._context.tp_rank, self._context.tp_size
        if self._manifest.tensor_parallel == ranks:
            self._reader = CheckpointReader(self.folder, rank)
            restore_weights(model, self._reader)
        else:
            merged = MergedReader(self.folder)
            self._reader = load_weights(model, merged, live_rows=model.vocabulary.size, rank=rank, ranks=ranks)

    def state_into(self, engine: Engine) -> None:
        """Copies masters, moments and step."""
        restore_engine(engine, self._reader)


def find_resume(store: Store, config: ResolvedConfig, corpus: str, context: ParallelContext) -> Resumed | None:
    """The newest complete checkpoint of this run, or None for a run that begins. Every rank calls this.

    Raises:
        CheckpointError: every checkpoint is damaged, or it is of another configuration or corpus.
    """
    with StageProgress(sys.stderr) as progress:
        found = store.newest_complete(progress.report if context.rank == 0 else no_report)
    if found is None:
        return None
    folder, manifest, said = found
    differences = config_differences(load(folder / "config.yaml"), config, manifest.step)
    if manifest.corpus != corpus:
        differences.append(f"corpus: {manifest.corpus} in the checkpoint, {corpus} in this run")
    if differences:
        raise CheckpointError(
            f"{folder}: a checkpoint of another configuration. Give back its values, or another run.dir:\n  "
            + "\n  ".join(differences)
            + how_to_extend(load(folder / "config.yaml"), config, manifest.step)
        )
    if context.rank == 0:
        for line in said:
            log.warning(line)
        log.info(f"resuming after step {manifest.step} from {folder}")
        if change := world_change(manifest, config, context):
            log.info(change)
    return Resumed(folder, manifest, context)


def world_change(manifest: Manifest, config: ResolvedConfig, context: ParallelContext) -> str | None:
    """What is new in this run's world, in one line; None when it is the one that wrote the checkpoint."""
    stage = deepspeed_config(config, data_parallel=context.dp_size)["zero_optimization"]["stage"]
    sizes = {
        "tensor parallel": (manifest.tensor_parallel, context.tp_size),
        "data parallel": (manifest.data_parallel, context.dp_size),
        "ZeRO stage": (manifest.zero_stage, stage),
    }
    changes = [f"{name} {old} -> {new}" for name, (old, new) in sizes.items() if old != new]
    return f"the world has changed, the state is cut anew: {', '.join(changes)}" if changes else None


def _progress(folder: Path, manifest: Manifest) -> Progress:
    expected = {field.name for field in fields(Progress)}
    if manifest.progress.keys() != expected:
        raise CheckpointError(
            f"{folder}: expected the counters {', '.join(sorted(expected))} of a run, got "
            f"{', '.join(manifest.progress) or 'none'}"
        )
    return Progress(**manifest.progress)


def progress_record(progress: Progress) -> dict[str, int]:
    """What a checkpoint keeps of the progress."""
    return asdict(progress)
