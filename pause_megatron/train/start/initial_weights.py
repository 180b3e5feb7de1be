"""`model.from`: the checkpoint whose weights a new run takes, and whether it fits the model and tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

from pause_megatron.checkpoint import MergedReader
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.config.batching import positions
from pause_megatron.config.load import load_saved
from pause_megatron.config.lora import lora_of, scale
from pause_megatron.config.model_from import SHAPE
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.distributed import ParallelContext
from pause_megatron.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_RUNS = ("loops", "loop_layers")
"""How often layers run, which a new run may change: a plain model becomes a looped one of the same weights."""


def find_initial_weights(place: str, config: ResolvedConfig, tokenizer: Tokenizer, context: ParallelContext) -> Path:
    """Return the folder of the checkpoint that `model.from` names. Every rank calls this.

    Args:
        place: `model.from`: a checkpoint, `latest`, a folder of checkpoints, or a run folder.
        config: Configuration of the new run.
        tokenizer: Tokenizer of the new run's data.
        context: Process groups of this rank.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is of another model, vocabulary or tokenizer; each
            difference is named.
    """
    try:
        found = open_newest(place, rank=context.rank, world_size=context.world_size)
    except CheckpointError as error:
        raise CheckpointError(f"model.from={place}: {error}") from None
    if differences := _differences(found.folder, config, tokenizer):
        raise CheckpointError(
            f"model.from={place}: weights of another model. Leave the model's sizes out to take the "
            f"checkpoint's, and prepare the data with the tokenizer {found.folder / 'tokenizer'}:\n  "
            + "\n  ".join(differences)
        )
    if context.rank == 0:
        source = load_saved(found.folder / "config.yaml")
        merged = ", its LoRA adapters merged" if lora_of(source) else ""
        log.info(f"initial weights from {found.folder}{merged}")
        if source.model.order != config.model.order:
            before, now = (
                ", ".join(f"model.{key}={getattr(each.model, key)}" for key in _RUNS) for each in (source, config)
            )
            log.warning(f"{now}: the weights of model.from={place} were trained with {before}")
        ours, theirs = positions(config), positions(source)
        if ours > theirs:
            log.warning(
                f"data.sequence_length={config.data.sequence_length}: expected at most the {theirs} positions of "
                f"model.from={place}, whose weights have met no others, got {ours}"
            )
    return found.folder


def check_trains_all(config: ResolvedConfig) -> None:
    """Check that a run from random initialization trains all of it: the part that `train.only` keeps would stay random.

    Args:
        config: Configuration of the run.

    Raises:
        ConfigError: `train.only` is set.
    """
    if config.train.only is not None:
        raise ConfigError(
            f"train.only={config.train.only}: expected model.from, a checkpoint whose weights the run keeps, got none"
        )


def merging_reader(folder: Path) -> MergedReader:
    """Return a reader of a checkpoint's weights with its LoRA adapters, if it has some, merged into them.

    Args:
        folder: The checkpoint.
    """
    lora = lora_of(load_saved(folder / "config.yaml"))
    return MergedReader(folder, adapter_scale=None if lora is None else scale(lora))


def _differences(folder: Path, config: ResolvedConfig, tokenizer: Tokenizer) -> list[str]:
    before = load_saved(folder / "config.yaml")
    differences = [
        f"model.{key}: {getattr(before.model, key)} in the checkpoint, {getattr(config.model, key)} in this run"
        for key in SHAPE
        if key not in _RUNS and getattr(before.model, key) != getattr(config.model, key)
    ]
    if before.pause.embeddings != config.pause.embeddings:
        differences.append(
            f"pause.embeddings: {before.pause.embeddings} in the checkpoint, {config.pause.embeddings} in this run"
        )
    saved = load_tokenizer(folder / "tokenizer")
    return differences + [
        f"tokenizer {name}: {getattr(saved, name)} in the checkpoint, {getattr(tokenizer, name)} in the data"
        for name in ("fingerprint", "vocab_size", "pause_id", "eod")
        if getattr(saved, name) != getattr(tokenizer, name)
    ]
