"""Whether a run's model and tokenizer can be exported together, known before the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pause_megatron.config.families import FAMILIES, families_of
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.hf.tokenizer import convert_tokenizer
from pause_megatron.hf.tokenizer_files import write_tokenizer
from pause_megatron.hf.tokenizer_parity import SENTENCES, compare_tokenizers

_OWN_TOKENIZER = frozenset({"qwen2"})
"""Model types for which transformers has a tokenizer of its own, whatever the folder's files are."""


def check_exportable(config: ResolvedConfig, open_tokenizer: Callable[[], Tokenizer]) -> None:
    """Check that transformers would read the run's tokenizer beside the run's model.

    Only a model that no other family computes is checked: every other one is exported as that family.

    Args:
        config: Configuration of the run.
        open_tokenizer: Returns the run's tokenizer; called only where it matters.

    Raises:
        ConfigError: It would give other ids, so that `export-hf` would refuse the run's checkpoints.
    """
    families = families_of(config.model)
    if not all(family.model_type in _OWN_TOKENIZER for family in families):
        return
    tokenizer = open_tokenizer()
    pause_ids = range(tokenizer.pause_id, tokenizer.pause_id + config.pause.embeddings)
    with TemporaryDirectory() as temporary:
        native, folder = Path(temporary, "native"), Path(temporary, "export")
        tokenizer.save(native)
        folder.mkdir()
        try:
            converted = convert_tokenizer(native, tokenizer, pause_ids)
            (folder / "config.json").write_text(json.dumps({"model_type": families[0].model_type}))
            write_tokenizer(folder, converted, tokenizer.companions, sequence_length=8, plain=True)
            compare_tokenizers(tokenizer, pause_ids, folder, SENTENCES)
        except CheckpointError as error:
            keys = ", ".join(f"model.{key}" for key in ("qkv_bias", *FAMILIES["llama"].lacks(config.model)))
            raise ConfigError(
                f"{keys}: expected the tokenizer of {families[0].title}, the only model in transformers with these "
                f"options, got one that an export would not keep: {error}"
            ) from None
