"""Check that the model's embedding has a row for every pause id.

Too few rows raise no error elsewhere. Under tensor parallelism, megatron-core's VocabParallelEmbedding gives zeros for
ids beyond its rows: the loss is finite, and the pauses learn nothing.
"""

from __future__ import annotations

import sys
import warnings

from pause_megatron.errors import ConfigError


def check_model_rows(pause_ids: range, rows: int | None) -> None:
    """Check that a model has enough embedding rows. Warn where the number is not known.

    Args:
        pause_ids: The K pause ids.
        rows: Rows of the model's embedding, padding included. None: those of the Megatron-LM in this process.

    Raises:
        ConfigError: There are too few rows.
    """
    if rows is None:
        rows = _rows_in_megatron_lm()
    if rows is None:
        warnings.warn(
            f"PauseGPTDatasetConfig: model_vocab_size is not given, so it is not checked that the model's embedding "
            f"has {pause_ids.stop} rows or more; with fewer the pauses are zeros that learn nothing",
            stacklevel=4,  # past check_model_rows, __post_init__ and __init__, to the line that makes the configuration
        )
    elif rows < pause_ids.stop:
        raise ConfigError(
            f"model_vocab_size: expected {pause_ids.stop} or more, a row for each id up to the last pause, got {rows}: "
            f"with Megatron-LM give --padded-vocab-size N, with N >= {pause_ids.stop} and a multiple of "
            f"--tensor-model-parallel-size"
        )


def _rows_in_megatron_lm() -> int | None:
    """Return `args.padded_vocab_size` of the Megatron-LM in this process, if it has parsed its arguments."""
    loaded = sys.modules.get("megatron.training.global_vars")
    try:
        return None if loaded is None else getattr(loaded.get_args(), "padded_vocab_size", None)
    except AssertionError:  # megatron.training is imported, but has no arguments yet
        return None
