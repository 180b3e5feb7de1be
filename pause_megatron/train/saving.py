"""The hook that saves checkpoints of a run, as long as the run folder is its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pause_megatron.checkpoint import Store, save
from pause_megatron.config.load import dump
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.train.guards.ownership import Ownership
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.inputs.streaming import Stream
from pause_megatron.train.loop import StepResult
from pause_megatron.train.start.resume import progress_record

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves the step that it is called with. Every rank calls it.

    Args:
        config: of the run
        engine: whose state is saved
        data: its fingerprint and tokenizer are saved with it
        store: where
        context: this rank's place
        stream: whose place is saved too, where the run streams its text
        owner: of the run folder

    Attributes:
        newest: the step that was saved last; None before the first save
    """

    def __init__(
        self,
        config: ResolvedConfig,
        engine: Engine,
        data: TrainingData,
        store: Store,
        context: ParallelContext,
        stream: Stream | None,
        owner: Ownership,
    ) -> None:
        self._config, self._engine, self._data, self._store = config, engine, data, store
        self._context, self._stream, self._owner = context, stream, owner
        self.newest: int | None = None

    def __call__(self, result: StepResult) -> None:
        self._owner.require()
        save(
            self._store,
            self._engine,
            self._context,
            step=result.step,
            corpus=self._data.fingerprint,
            progress=progress_record(result.progress),
            config_yaml=dump(self._config),
            save_tokenizer=self._save_tokenizer,
            keep=self._config.checkpoint.keep,
            extra=self._stream.files(result.step) if self._stream else {},
        )
        self.newest = result.step

    @contextmanager
    def naming_the_newest(self) -> Iterator[None]:
        """Whatever ends the body, it is said what there is to go on from."""
        try:
            yield
        except BaseException:
            if self.newest is not None and self._context.rank == 0:
                place = self._store.path(self.newest)
                log.info(f"step {self.newest} was saved to {place}: the same command resumes from there")
            raise

    def _save_tokenizer(self, folder: Path) -> None:
        self._data.tokenizer.save(folder)
        self._owner.require_on_this_rank()  # late in the save, which may take long: before the checkpoint has its name
