"""Where a run begins: a checkpoint of its own, the weights of another model, or initial weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from pause_megatron.checkpoint import Store
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.model import PauseGPTModel
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.loop import Progress
from pause_megatron.train.start.initial_weights import InitialWeights
from pause_megatron.train.start.resume import find_resume
from pause_megatron.train.start.start_over import before_the_first_step

log = logging.getLogger(__name__)


class Start(Protocol):
    """Fills a fresh model, then the engine that DeepSpeed makes of it. Every rank calls both, in this order."""

    @property
    def folder(self) -> Path | None:
        """The run's own checkpoint to go on from, where there is one."""
        ...

    @property
    def progress(self) -> Progress:
        """What the run has seen so far."""
        ...

    @property
    def draws(self) -> bool:
        """Whether the model must have its initial weights before `weights_into`."""
        ...

    def weights_into(self, model: PauseGPTModel) -> None:
        """Before DeepSpeed sees the model."""
        ...

    def state_into(self, engine: Engine) -> None:
        """The fp32 master weights, and the optimizer's moments and step where there are any."""
        ...


class FromScratch:
    """The model as it was made."""

    folder = None
    progress = Progress()
    draws = True

    def weights_into(self, model: PauseGPTModel) -> None:
        """Nothing to do."""

    def state_into(self, engine: Engine) -> None:
        """Nothing to do."""


def find_start(store: Store, config: ResolvedConfig, data: TrainingData, context: ParallelContext) -> Start:
    """The newest complete checkpoint of the run; else `model.from`; else from scratch. Every rank calls this.

    Raises:
        CheckpointError: a checkpoint that is damaged, or of another run or model; the differences are named. Or the
            run had checkpoints, which are gone.
        ConfigError: a run that is to be extended has none.
    """
    resumed = find_resume(store, config, data.fingerprint, context)
    if resumed is not None:
        if config.run.start_over and context.rank == 0:
            note = "run.start_over=true has no effect beside a complete checkpoint. To begin anew name another run.dir"
            log.warning(f"{note}, or move {store.folder} away")
        return resumed
    before_the_first_step(config, store.folder, context)
    return InitialWeights(config, data.tokenizer, context) if config.model.from_ else FromScratch()
