"""A run without a checkpoint: a new run, one killed before its first save, or one whose checkpoints are gone.

A run whose checkpoints are gone does not restart at step 1 by itself: a file system that is not mounted looks the same.
`RUN/.checkpoints.json` tells them apart: it holds the step of the checkpoint that was published last, 0 before the
first. Where that file is missing (runs of older versions), metrics.jsonl decides: it must not go beyond the first save.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from pause_megatron.config.load import load_saved
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import broadcast_object
from pause_megatron.errors import CheckpointError, PauseMegatronError
from pause_megatron.files import metrics_lines
from pause_megatron.run_folder import last_published, record_of, record_published
from pause_megatron.train.start.extension import check_extends_nothing

log = logging.getLogger(__name__)


def check_no_lost_checkpoint(config: ResolvedConfig, checkpoints: Path, context: ParallelContext) -> None:
    """Check that a run without a checkpoint has lost none, and move old metrics away under `run.start_over`.

    Every rank calls this; rank 0 reads and writes the run folder.

    Args:
        config: Configuration of the run.
        checkpoints: `RUN/checkpoints`.
        context: Process groups of this rank.

    Raises:
        CheckpointError: The run had checkpoints, which are gone; or `checkpoints` is no folder.
        ConfigError: `train.extended_from` is set.
    """
    problem = _check_on_rank_zero(config, checkpoints) if context.rank == 0 else None
    if (problem := broadcast_object(problem)) is not None:
        raise CheckpointError(problem)
    check_extends_nothing(config)


def _check_on_rank_zero(config: ResolvedConfig, checkpoints: Path) -> str | None:
    """Return what is wrong, so that all ranks can raise it."""
    folder = Path(config.run.dir)
    if fault := not_a_folder(checkpoints):
        return fault
    lost = lost_step(folder, config)
    if lost is not None and not (config.run.start_over and config.train.extended_from is None):
        return _lost_checkpoint_error(config, checkpoints, lost)
    if config.train.extended_from is not None:
        return None
    try:
        if config.run.start_over:
            move_aside(folder)
    except OSError as error:
        return f"{folder}: run.start_over=true: {error.filename} cannot be renamed: {error.strerror}"
    with suppress(OSError):  # the next start then looks at metrics.jsonl
        record_published(checkpoints, 0)
    return None


def not_a_folder(checkpoints: Path) -> str | None:
    """Return why `RUN/checkpoints` cannot be used, in a line; None where it is a folder or does not exist."""
    link = checkpoints.is_symlink()
    if checkpoints.is_dir() or not (link or checkpoints.exists()):
        return None
    found = f"a link to {checkpoints.readlink()}, which is no folder" if link else "a file"
    return f"{checkpoints}: expected a folder, got {found}. Restore the folder (not mounted?), or remove that"


def lost_step(folder: Path, config: ResolvedConfig) -> int | None:
    """Return the last step that a run without checkpoints is known to have saved; None: it may have saved none.

    Args:
        folder: The run folder.
        config: Configuration of this start, used where the run's own config.yaml cannot be read.
    """
    published = last_published(folder / "checkpoints")
    if published is not None:
        return published or None
    last = metrics_lines.last_step(folder / metrics_lines.NAME)
    with suppress(PauseMegatronError):  # missing, or of another version
        config = load_saved(folder / "config.yaml")
    every = config.checkpoint.every
    # A step is saved after its line is written: only a later line proves that the save completed.
    return None if last is None or not every or last <= every else (last - 1) // every * every


def move_aside(folder: Path) -> None:
    """Rename metrics.jsonl and tensorboard/ of an earlier attempt to `*.before-DATE-TIME*`, and log it.

    Args:
        folder: The run folder.

    Raises:
        OSError: One of them cannot be renamed.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in (metrics_lines.NAME, "tensorboard"):
        path = folder / name
        if not path.exists():
            continue
        aside = _unused_name(path, stamp)
        path.rename(aside)
        log.info(f"run.start_over=true: {path} is kept as {aside.name}")


def _unused_name(path: Path, stamp: str) -> Path:
    """Return a path beside `path` that does not exist yet."""
    number, aside = 1, path.with_name(f"{path.stem}.before-{stamp}{path.suffix}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.stem}.before-{stamp}-{number}{path.suffix}")
    return aside


def _lost_checkpoint_error(config: ResolvedConfig, checkpoints: Path, lost: int) -> str:
    metrics = Path(config.run.dir) / metrics_lines.NAME
    keys = (
        "run.start_over=true" if config.train.extended_from is None else "run.start_over=true train.extended_from=null"
    )
    last = metrics_lines.last_step(metrics)
    evidence = f"{metrics} goes up to step {last:,}" if last is not None else f"{record_of(checkpoints)} has it"
    state = "does not exist" if not checkpoints.exists() else "holds no checkpoint"
    return (
        f"{checkpoints}: expected the checkpoint of step {lost:,} or a later one, got none: {evidence}, but "
        f"{checkpoints} {state}. Restore the checkpoints (moved, or not mounted?), or set {keys} to start at step 1: "
        f"the old metrics are then kept as {metrics.stem}.before-DATE-TIME{metrics.suffix}"
    )
