"""Saving checkpoints of a run, while the run folder is its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pause_megatron.checkpoint import save
from pause_megatron.config.load import dump
from pause_megatron.train.guards.own_code import sources_file
from pause_megatron.train.loop import StepResult
from pause_megatron.train.run import Run
from pause_megatron.train.start.resume import progress_record

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Action that saves a checkpoint of the step that it is called with. Every rank calls it.

    Args:
        run: The run; its `saved_step` is updated.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, result: StepResult) -> None:
        """Save a checkpoint.

        Args:
            result: Result of the step that was taken last.

        Raises:
            ConfigError: Another job has taken the run folder over.
            CheckpointError: A rank could not write.
        """
        run = self._run
        run.owner.require()
        save(
            run.store,
            run.engine,
            run.context,
            step=result.step,
            corpus=run.data.fingerprint,
            progress=progress_record(result.progress),
            config_yaml=dump(run.config),
            save_tokenizer=self._save_tokenizer,
            keep=run.config.checkpoint.keep,
            extra={**(run.stream.files(result.step) if run.stream else {}), **sources_file(run.sources)},
        )
        run.saved_step = result.step

    def _save_tokenizer(self, folder: Path) -> None:
        self._run.data.tokenizer.save(folder)
        self._run.owner.require_on_this_rank()  # late in a save that may take long, before the checkpoint is renamed


@contextmanager
def naming_last_checkpoint(run: Run) -> Iterator[None]:
    """Log the checkpoint to resume from when an exception ends the body.

    Args:
        run: The run.
    """
    try:
        yield
    except BaseException:
        if run.saved_step is not None and run.context.rank == 0:
            place = run.store.path(run.saved_step)
            log.info(f"step {run.saved_step} was saved to {place}: the same command resumes from there")
        raise
