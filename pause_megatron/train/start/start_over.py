"""A run that finds no checkpoint: new, killed before its first save, or one whose checkpoints are gone.

The last of these does not begin at step 1 by itself: a file system that is not mounted looks the same. How they are
told apart: `RUN/.checkpoints.json` says which checkpoint was published last, step 0 while there was none. Where
that file is missing (a run of a version that did not write it) metrics.jsonl decides: whether it goes further than the
first save.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from pause_megatron.config.load import load
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import broadcast_object
from pause_megatron.errors import CheckpointError, PauseMegatronError
from pause_megatron.files import metrics_lines
from pause_megatron.run_folder import last_published, record_of, record_published
from pause_megatron.train.start.extension import refuse_extending_nothing

log = logging.getLogger(__name__)


def before_the_first_step(config: ResolvedConfig, checkpoints: Path, context: ParallelContext) -> None:
    """Looks at the folder of a run that found no checkpoint, and puts aside what an earlier attempt left there where
    run.start_over asks for it. Every rank calls this; rank 0 looks.

    Raises:
        CheckpointError: the run had checkpoints, which are gone; or something else stands in their place.
        ConfigError: a run that is to be extended has none.
    """
    problem = _on_rank_zero(config, checkpoints) if context.rank == 0 else None
    if (problem := broadcast_object(problem)) is not None:
        raise CheckpointError(problem)
    refuse_extending_nothing(config)


def _on_rank_zero(config: ResolvedConfig, checkpoints: Path) -> str | None:
    folder = Path(config.run.dir)
    if wrong := not_a_folder(checkpoints):
        return wrong
    lost = lost_step(folder, config)
    if lost is not None and not (config.run.start_over and config.train.extended_from is None):
        return _refusal(config, checkpoints, lost)
    if config.train.extended_from is not None:
        return None
    try:
        if config.run.start_over:
            put_aside(folder)
    except OSError as error:
        return f"{folder}: run.start_over=true: {error.filename} cannot be put aside: {error.strerror}"
    with suppress(OSError):  # the metrics decide then
        record_published(checkpoints, 0)
    return None


def not_a_folder(checkpoints: Path) -> str | None:
    """What is wrong with `RUN/checkpoints`, in a line; None where it is a folder or nothing."""
    link = checkpoints.is_symlink()
    if checkpoints.is_dir() or not (link or checkpoints.exists()):
        return None
    found = f"a link to {checkpoints.readlink()}, which is no folder" if link else "a file"
    return f"{checkpoints}: expected a folder, got {found}. Give the folder back (not mounted?), or remove that"


def lost_step(folder: Path, config: ResolvedConfig) -> int | None:
    """The last step that a run without checkpoints is known to have saved; None: it may have saved none."""
    published = last_published(folder / "checkpoints")
    if published is not None:
        return published or None
    last = metrics_lines.last_step(folder / metrics_lines.NAME)
    with suppress(PauseMegatronError):  # gone, or of another version: this start's configuration is the best guess
        config = load(folder / "config.yaml")
    every = config.checkpoint.every
    # The save of a step comes behind its line: only a later line proves that it was made.
    return None if last is None or not every or last <= every else (last - 1) // every * every


def put_aside(folder: Path) -> None:
    """Gives metrics.jsonl and tensorboard/ names that say when they were put aside; says so on stderr.

    Raises:
        OSError: one cannot be renamed.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in (metrics_lines.NAME, "tensorboard"):
        path = folder / name
        if not path.exists():
            continue
        aside = _free(path, stamp)
        path.rename(aside)
        log.info(f"run.start_over=true: {path} is kept as {aside.name}")


def _free(path: Path, stamp: str) -> Path:
    """A name beside a path that nothing has yet."""
    number, aside = 1, path.with_name(f"{path.stem}.before-{stamp}{path.suffix}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.stem}.before-{stamp}-{number}{path.suffix}")
    return aside


def _refusal(config: ResolvedConfig, checkpoints: Path, lost: int) -> str:
    metrics = Path(config.run.dir) / metrics_lines.NAME
    keys = (
        "run.start_over=true" if config.train.extended_from is None else "run.start_over=true train.extended_from=null"
    )
    last = metrics_lines.last_step(metrics)
    there = f"{metrics} goes up to step {last:,}" if last is not None else f"{record_of(checkpoints)} says so"
    state = "is not there" if not checkpoints.exists() else "holds no checkpoint"
    return (
        f"{checkpoints}: expected the checkpoint of step {lost:,} or a later one, got none: {there}, but {checkpoints} "
        f"{state}. Give the checkpoints back (moved? not mounted?), or give {keys} to begin at step 1: "
        f"the old metrics are then kept as {metrics.stem}.before-DATE-TIME{metrics.suffix}"
    )
