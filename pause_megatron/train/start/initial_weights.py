"""`model.from`: a new run that begins with the weights of a checkpoint, its optimizer and its step fresh."""

from __future__ import annotations

import logging
from pathlib import Path

from pause_megatron.checkpoint import MergedReader, load_weights, restore_masters
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.config.load import load
from pause_megatron.config.model_from import SHAPE
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.distributed import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.errors import CheckpointError
from pause_megatron.model import PauseGPTModel
from pause_megatron.train.loop import Progress

log = logging.getLogger(__name__)


class InitialWeights:
    """The weights of `model.from`, of any tensor-parallel size, data-parallel size and ZeRO stage.

    Args:
        config: of the run that begins
        tokenizer: of its data
        context: this rank's place

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one of another model, vocabulary or tokenizer; each
            difference is named.
    """

    folder = None
    progress = Progress()
    draws = False

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer, context: ParallelContext) -> None:
        self._context = context
        try:
            found = open_newest(config.model.from_, rank=context.rank, world_size=context.world_size)
        except CheckpointError as error:
            raise CheckpointError(f"model.from={config.model.from_}: {error}") from None
        self._folder = found.folder
        if differences := _differences(self._folder, config, tokenizer):
            raise CheckpointError(
                f"model.from={config.model.from_}: weights of another model. Leave the model's sizes out to take the "
                f"checkpoint's, and prepare the data with the tokenizer {self._folder / 'tokenizer'}:\n  "
                + "\n  ".join(differences)
            )

    def weights_into(self, model: PauseGPTModel) -> None:
        """Copies the weights into a fresh model, before DeepSpeed sees it."""
        if self._context.rank == 0:
            log.info(f"initial weights from {self._folder}")
        rank, ranks = self._context.tp_rank, self._context.tp_size
        reader = MergedReader(self._folder)
        self._shards = load_weights(model, reader, live_rows=model.vocabulary.size, rank=rank, ranks=ranks)

    def state_into(self, engine: Engine) -> None:
        """Copies them into the engine's fp32 masters, unrounded; its moments and step stay fresh."""
        restore_masters(engine, self._shards)


def _differences(folder: Path, config: ResolvedConfig, tokenizer: Tokenizer) -> list[str]:
    before = load(folder / "config.yaml")
    differences = [
        f"model.{key}: {getattr(before.model, key)} in the checkpoint, {getattr(config.model, key)} in this run"
        for key in SHAPE
        if getattr(before.model, key) != getattr(config.model, key)
    ]
    if before.pause.embeddings != config.pause.embeddings:
        differences.append(
            f"pause.embeddings: {before.pause.embeddings} in the checkpoint, {config.pause.embeddings} in this run"
        )
    theirs = load_tokenizer(folder / "tokenizer")
    return differences + [
        f"tokenizer {name}: {getattr(theirs, name)} in the checkpoint, {getattr(tokenizer, name)} in the data"
        for name in ("fingerprint", "vocab_size", "pause_id", "eod")
        if getattr(theirs, name) != getattr(tokenizer, name)
    ]
