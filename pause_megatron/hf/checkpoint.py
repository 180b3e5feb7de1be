"""A native checkpoint as a whole: configuration, tokenizer, vocabulary and weights, checked to belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pause_megatron.checkpoint.merge import MergedReader
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.checkpoint.verify import Report
from pause_megatron.config.load import load
from pause_megatron.config.model_from import read_config_text
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import CheckpointError, ConfigError, DataError
from pause_megatron.hf.weights import native_shapes
from pause_megatron.model import Vocabulary


@dataclass(frozen=True)
class NativeCheckpoint:
    """A checkpoint whose files are as they were written and fit each other.

    Attributes:
        folder: resolved
        config: of the run that wrote it
        tokenizer: its own
        vocabulary: which rows are text and pauses
        reader: of its weights
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
    """Opens a checkpoint after reading all of it once, to compare digests.

    Args:
        path: a checkpoint, `.../latest`, `RUN/checkpoints` or `RUN`
        report: told how far the digests are

    Raises:
        CheckpointError: missing, damaged or altered; or its parts do not belong together.
    """
    found = open_newest(path, report=report)
    folder, manifest = found.folder, found.manifest
    for name in ("config.yaml", "tokenizer/pause_tokenizer.json"):
        if name not in manifest.files:
            raise CheckpointError(f"{folder}: expected a file {name}, its manifest names none")
    try:
        read_config_text(folder / "config.yaml")  # refuses one that is too large
        config = load(folder / "config.yaml")
        tokenizer = load_tokenizer(folder / "tokenizer")
        tokenizer.check_pause_ids(config.pause.embeddings)
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of a run: {error}") from None
    ids = range(tokenizer.pause_id, tokenizer.pause_id + config.pause.embeddings)
    vocabulary = Vocabulary(tokenizer.vocab_size, tuple(ids))
    reader = MergedReader(folder)
    _check_parameters(config, vocabulary, reader)
    return NativeCheckpoint(folder, config, tokenizer, vocabulary, reader)


def _check_parameters(config: ResolvedConfig, vocabulary: Vocabulary, reader: MergedReader) -> None:
    """The manifest's parameters are those of the configuration's model, before anything of their size is allocated."""
    found = reader.manifest.parameters
    if config.model.layers > len(found):
        raise CheckpointError(
            f"{reader.folder}: config.yaml says {config.model.layers:,} layers, the manifest has "
            f"{len(found):,} parameters"
        )
    padded = vocabulary.padded(config.model.vocab_multiple, reader.manifest.tensor_parallel)
    expected = native_shapes(config.model, padded)
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{reader.folder}: parameter {name}: expected shape {shape} (config.yaml, a vocabulary of "
                f"{vocabulary.size:,} padded to {padded:,}), the manifest says {reader.shape(name)}"
            )
    if len(found) != len(expected):
        raise CheckpointError(f"{reader.folder}: expected {len(expected)} parameters, the manifest has {len(found)}")
