"""`model.from`: a new run that begins with the weights of a checkpoint, its optimizer and its step fresh."""

from __future__ import annotations

import sys

from pause_megatron.checkpoint.merge import MergedReader, ShardReader, load_weights
from pause_megatron.checkpoint.store import Store, resolve
from pause_megatron.config.initial import SHAPE
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.data.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.distributed import ParallelContext
from pause_megatron.errors import CheckpointError
from pause_megatron.model import PauseGPTModel


def load_initial_weights(
    model: PauseGPTModel, config: RunConfig, tokenizer: Tokenizer, context: ParallelContext
) -> ShardReader:
    """Copies the weights of `model.from` into a fresh model. Every rank calls this, before DeepSpeed sees the model.

    The checkpoint may be of any tensor-parallel size, data-parallel size and ZeRO stage.

    Args:
        model: this rank's shard
        config: of the run that begins
        tokenizer: of its corpus
        context: this rank's place

    Returns:
        What the weights were read from, for `restore_masters` when the engine is there.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one of another model, vocabulary or tokenizer; each
            difference is named.
    """
    folder = resolve(config.model.from_)
    if problems := Store(folder.parent, context.rank, context.world_size).verify(folder):
        raise CheckpointError(
            f"model.from={config.model.from_}: the checkpoint is damaged:\n  " + "\n  ".join(problems)
        )
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
    differences += [
        f"tokenizer {name}: {getattr(theirs, name)} in the checkpoint, {getattr(tokenizer, name)} in the corpus"
        for name in ("fingerprint", "vocab_size", "pause_id", "eod")
        if getattr(theirs, name) != getattr(tokenizer, name)
    ]
    if differences:
        raise CheckpointError(
            f"model.from={config.model.from_}: weights of another model. Leave the model's sizes out to take the "
            f"checkpoint's, and prepare the corpus with --tokenizer {folder / 'tokenizer'}:\n  "
            + "\n  ".join(differences)
        )
    if context.rank == 0:
        print(f"initial weights from {folder}", file=sys.stderr)
    return load_weights(
        model, MergedReader(folder), live_rows=model.vocabulary.size, rank=context.tp_rank, ranks=context.tp_size
    )
