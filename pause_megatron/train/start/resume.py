"""Resume: find the run's newest complete checkpoint, and check that it is of this configuration and corpus."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from pause_megatron.checkpoint import Manifest, Store
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.load import load_saved, scheduled
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.errors import CheckpointError
from pause_megatron.terminal.progress import StageProgress, no_report
from pause_megatron.train.loop import Progress
from pause_megatron.train.start.extension import config_differences, how_to_extend

log = logging.getLogger(__name__)


class FoundCheckpoint(NamedTuple):
    """A complete checkpoint of this run.

    Attributes:
        folder: Folder of the checkpoint.
        progress: Counters of the run at its step.
    """

    folder: Path
    progress: Progress


def find_checkpoint(
    store: Store, config: ScheduledConfig, corpus: str, context: ParallelContext
) -> FoundCheckpoint | None:
    """Return the newest complete checkpoint of this run, or None where it has none. Every rank calls this.

    Args:
        store: The run's checkpoints.
        config: Configuration of the run.
        corpus: Fingerprint of the training data.
        context: Process groups of this rank.

    Raises:
        CheckpointError: Every checkpoint is damaged, or it is of another configuration or corpus.
    """
    with StageProgress(sys.stderr) as progress:
        found = store.newest_complete(progress.report if context.rank == 0 else no_report)
    if found is None:
        return None
    folder, manifest, notes = found
    saved = scheduled(load_saved(folder / "config.yaml"))
    differences = config_differences(saved, config, manifest.step)
    extending = how_to_extend(saved, config, manifest.step)
    if manifest.corpus != corpus:
        differences.append(f"corpus: {manifest.corpus} in the checkpoint, {corpus} in this run")
        extending = ""  # which would be refused for the corpus
    if differences:
        raise CheckpointError(
            f"{folder}: the checkpoint has another configuration. Restore these values, or choose another run.dir:\n  "
            + "\n  ".join(differences)
            + extending
        )
    if context.rank == 0:
        for line in notes:
            log.warning(line)
        log.info(f"resuming after step {manifest.step} from {folder}")
        if change := topology_change(manifest, config, context):
            log.info(change)
    return FoundCheckpoint(folder, progress_from_record(manifest.progress, folder))


def topology_change(manifest: Manifest, config: ResolvedConfig, context: ParallelContext) -> str | None:
    """Return a line about what differs from the topology that wrote the checkpoint; None where nothing does.

    Args:
        manifest: Manifest of the checkpoint.
        config: Configuration of the run.
        context: Process groups of this rank.
    """
    stage = deepspeed_config(config, data_parallel=context.dp_size)["zero_optimization"]["stage"]
    sizes = {
        "tensor parallel": (manifest.tensor_parallel, context.tp_size),
        "data parallel": (manifest.data_parallel, context.dp_size),
        "ZeRO stage": (manifest.zero_stage, stage),
    }
    changes = [f"{name} {old} -> {new}" for name, (old, new) in sizes.items() if old != new]
    return f"topology changed, resharding the checkpoint: {', '.join(changes)}" if changes else None


def progress_from_record(record: dict[str, int], folder: Path) -> Progress:
    """Return the counters that a checkpoint's manifest holds.

    Args:
        record: `progress` of the manifest.
        folder: Folder of the checkpoint, for messages.

    Raises:
        CheckpointError: The manifest holds other counters than a run's.
    """
    expected = {field.name for field in fields(Progress)}
    if record.keys() != expected:
        raise CheckpointError(
            f"{folder}: expected the counters {', '.join(sorted(expected))} of a run, got {', '.join(record) or 'none'}"
        )
    return Progress(**record)


def progress_record(progress: Progress) -> dict[str, int]:
    """Return the counters as a checkpoint's manifest holds them."""
    return asdict(progress)
