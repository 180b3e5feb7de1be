"""A native checkpoint opened for export: configuration, tokenizer, vocabulary and weights, checked for consistency."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pause_megatron.checkpoint.layout import is_auxiliary
from pause_megatron.checkpoint.merge import MergedReader
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.config.load import load_saved
from pause_megatron.config.lora import adapters, lora_of, scale
from pause_megatron.config.model_from import read_config_text
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import CheckpointError, ConfigError, DataError
from pause_megatron.hf.weights import native_shapes
from pause_megatron.model import Vocabulary
from pause_megatron.terminal.progress import Report


@dataclass(frozen=True)
class NativeCheckpoint:
    """A verified checkpoint.

    Attributes:
        folder: Resolved path of the checkpoint.
        config: Configuration of the run that wrote it.
        tokenizer: Tokenizer of the checkpoint.
        vocabulary: Text rows and pause rows of the embedding.
        reader: Reader of the merged weights; LoRA adapters are merged into them.
    """

    folder: Path
    config: ResolvedConfig
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    reader: MergedReader

    @property
    def pause_ids(self) -> range:
        """The K pause ids."""
        return range(self.tokenizer.pause_id, self.tokenizer.pause_id + self.config.pause.embeddings)


def open_checkpoint(path: str | Path, report: Report) -> NativeCheckpoint:
    """Open a checkpoint and verify the digests of all its files.

    Args:
        path: A checkpoint, `.../latest`, `RUN/checkpoints` or `RUN`.
        report: Progress callback.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or modified, or its parts are inconsistent.
    """
    newest = open_newest(path, report=report)
    folder, manifest = newest.folder, newest.manifest
    for name in ("config.yaml", "tokenizer/pause_tokenizer.json"):
        if name not in manifest.files:
            raise CheckpointError(f"{folder}: expected a file {name}, got none in its manifest")
    try:
        read_config_text(folder / "config.yaml")  # refuses one that is too large
        config = load_saved(folder / "config.yaml")
        tokenizer = load_tokenizer(folder / "tokenizer")
        tokenizer.check_pause_ids(config.pause.embeddings)
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of a run: {error}") from None
    ids = range(tokenizer.pause_id, tokenizer.pause_id + config.pause.embeddings)
    vocabulary = Vocabulary(tokenizer.vocab_size, tuple(ids))
    lora = lora_of(config)
    reader = MergedReader(folder, adapter_scale=None if lora is None else scale(lora))
    _check_parameters(config, vocabulary, reader)
    return NativeCheckpoint(folder, config, tokenizer, vocabulary, reader)


def _check_parameters(config: ResolvedConfig, vocabulary: Vocabulary, reader: MergedReader) -> None:
    """Compare the manifest's parameters with the configuration's model, before memory is allocated for them."""
    parameters = reader.manifest.parameters
    if config.model.layers > len(parameters):
        raise CheckpointError(
            f"{reader.folder}: expected parameters of {config.model.layers:,} layers (config.yaml), the manifest has "
            f"{len(parameters):,} parameters"
        )
    padded = vocabulary.padded(config.model.vocab_multiple, reader.manifest.tensor_parallel)
    expected = native_shapes(config.model, padded)
    if (lora := lora_of(config)) is not None:
        for layer in range(config.model.layers):
            expected |= {f"decoder.layers.{layer}.{one.name}": one.shape for one in adapters(config.model, lora, layer)}
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{reader.folder}: parameter {name}: expected shape {shape} (config.yaml, a vocabulary of "
                f"{vocabulary.size:,} padded to {padded:,}), got {reader.shape(name)} in the manifest"
            )
    count = sum(not is_auxiliary(name) for name in parameters)
    if count != len(expected):
        raise CheckpointError(f"{reader.folder}: expected {len(expected)} parameters, got {count} in the manifest")
