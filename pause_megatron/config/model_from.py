"""Sizes that `model.from` implies, read off the config.yaml of the checkpoint with the initial weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from pause_megatron.config.identity import ADDED_FREE_KEYS, ADDED_KEYS
from pause_megatron.config.renamed import with_new_names
from pause_megatron.config.schema import DataSection
from pause_megatron.config.text import Entry, read_entries
from pause_megatron.errors import ConfigError
from pause_megatron.run_folder import choose

SHAPE = (
    *("layers", "hidden", "heads", "kv_heads", "ffn", "tied", "qkv_bias", "rope_base", "norm_eps", "loops"),
    *("loop_layers", "head_dim", "proj_bias", "mlp_bias", "qk_norm", "norm", "sliding_window", "sliding_from"),
    *("rope_scaling", "rope_factor", "rope_original_length", "rope_low_freq", "rope_high_freq"),
    *("rope_beta_fast", "rope_beta_slow", "rope_truncate", "rope_attention_factor", "positions", "family"),
)
"""Keys of the model section that decide what a model computes with given weights."""

PAUSES = ("pause.embeddings", "pause.softmax", "pause.positions")
"""Keys of the pause section that do so."""

OF_A_TASK = (
    *("pause.rate", "pause.window", "pause.placement", "pause.run", "pause.pattern", "pause.seed"),
    "data.sequence_length",
)
"""Further keys that a finetuning takes from the pretraining: its window, and the placement of its pauses."""

_LARGEST_BYTES = 1 << 20


def checkpoint_config(path: str | Path) -> Path:
    """Return the config.yaml of a checkpoint, of `RUN/checkpoints` or of `RUN`.

    Args:
        path: One of these folders.

    Raises:
        ConfigError: None of them has one.
    """
    try:
        for folder in choose(path).folders:
            if (folder / "config.yaml").is_file():
                return folder / "config.yaml"
    except OSError:  # no file can have this name
        pass
    first = ""
    if _is_of_transformers(path):
        first = f"; import it first: pause-megatron import-hf {shlex.quote(str(path))} CHECKPOINT"
    raise ConfigError(
        "model.from: expected a checkpoint (a folder with manifest.json and config.yaml) or a run folder, got "
        f"{path}{first}"
    )


def _is_of_transformers(path: str | Path) -> bool:
    try:
        return (Path(path) / "config.json").is_file()
    except OSError:
        return False


def read_config_text(path: Path) -> str:
    """Return the text of a checkpoint's config.yaml.

    Args:
        path: The file.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or is much larger than any configuration.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path}: expected at most {_LARGEST_BYTES:,} bytes, got {path.stat().st_size:,}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def with_initial_sizes(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Add the sizes that `model.from` implies and the entries leave out; for a finetuning the window too.

    A configuration that gives all of them (a run's own config.yaml) is left as it is: the run can resume when the
    checkpoint with its initial weights is gone.

    Args:
        entries: Keys that were given, by dotted path.

    Raises:
        ConfigError: `model.from` leads to no checkpoint.
    """
    origin, task = entries.get("model.from"), entries.get("task.name")
    wanted = [*(f"model.{name}" for name in SHAPE), *PAUSES]
    if task is not None and task.value is not None:
        wanted += OF_A_TASK
    missing = [name for name in wanted if name not in entries]
    if origin is None or origin.value is None or not missing:
        return dict(entries)
    try:
        path = checkpoint_config(str(origin.value))
    except ConfigError:
        if set(missing) <= {
            *ADDED_KEYS,
            *ADDED_FREE_KEYS,
        }:  # a run's own config.yaml, written before these keys existed
            return dict(entries)
        raise
    written, _ = with_new_names(read_entries(read_config_text(path), str(path)))
    theirs = {entry.path: entry for entry in written}
    taken = {name: theirs[name] for name in ("model.preset", *missing) if name in theirs and name not in entries}
    if _is_longer_than_default(taken.get("data.sequence_length")):
        del taken["data.sequence_length"]
    return {**entries, **taken}


def _is_longer_than_default(window: Entry | None) -> bool:
    """Return whether a checkpoint's window is longer than the default; imported models have 131,072 and more."""
    longest = DataSection.model_fields["sequence_length"].default
    return window is not None and isinstance(window.value, int) and window.value > longest
