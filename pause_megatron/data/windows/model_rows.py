"""Whether a model has a row for every pause id. One that has none says nothing: megatron-core's VocabParallelEmbedding
gives zeros for ids beyond its rows, so that the loss is finite and the pauses learn nothing.
"""

from __future__ import annotations

import sys
import warnings

from pause_megatron.errors import ConfigError


def check_model_rows(pause_ids: range, rows: int | None) -> None:
    """Refuse a model that has too few rows; warn where the number is not known.

    Args:
        pause_ids: The K pause ids.
        rows: Rows of the model's embedding, padding included. None: those of the Megatron-LM in this process.

    Raises:
        ConfigError: too few.
    """
    if rows is None:
        rows = _rows_in_megatron_lm()
    if rows is None:
        warnings.warn(
            f"PauseGPTDatasetConfig: model_vocab_size is not given, so it is not checked that the model's embedding "
            f"has {pause_ids.stop} rows or more; with fewer the pauses are zeros that learn nothing",
            stacklevel=4,  # this, __post_init__, __init__: whoever makes the configuration
        )
    elif rows < pause_ids.stop:
        raise ConfigError(
            f"model_vocab_size: expected {pause_ids.stop} or more, a row for each id up to the last pause, got {rows}: "
            f"with Megatron-LM give --padded-vocab-size N, with N >= {pause_ids.stop} and a multiple of "
            f"--tensor-model-parallel-size"
        )


def _rows_in_megatron_lm() -> int | None:
    """`args.padded_vocab_size` of a Megatron-LM that is loaded and has read its arguments. Loads nothing."""
    loaded = sys.modules.get("megatron.training.global_vars")
    try:
        return None if loaded is None else getattr(loaded.get_args(), "padded_vocab_size", None)
    except AssertionError:  # megatron.training is imported, but does not run
        return None
