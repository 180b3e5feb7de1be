"""Tokenizer and generation files of an export: copies of the source's with the pauses added, or plain new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.companions import CONFIG, GENERATION, SPECIAL, place_of
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.tokenizer import HFTokenizer

# Reads tokenizer.json unchanged; the classes named after models rebuild parts of it.
PLAIN_CLASS = "PreTrainedTokenizerFast"
_CLASSES_OF_ONE_RELEASE = ("TokenizersBackend",)  # the name in transformers 5, unknown to 4
_NAMES, _NAMES_OF_5 = "additional_special_tokens", "extra_special_tokens"


def write_tokenizer(
    folder: Path, tokenizer: HFTokenizer, companions: Mapping[str, bytes], *, sequence_length: int, plain: bool
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat templates.

    Args:
        folder: The export.
        tokenizer: The converted tokenizer with its pauses.
        companions: The source's files by name, see `data/tokenizer/companions.py`; may be empty.
        sequence_length: model_max_length where the source has none.
        plain: Use the class that reads tokenizer.json unchanged instead of the class that the source names.

    Raises:
        CheckpointError: A companion that is not a JSON object.
    """
    _write(folder / "tokenizer.json", tokenizer.document, indent=None)
    names = {f"{role}_token": name for role, name in tokenizer.special.items()}
    config = _object(companions, CONFIG)
    if config is None:
        config = {"model_max_length": sequence_length, "padding_side": "left", "clean_up_tokenization_spaces": False}
        config |= names
    else:
        names = {}
    special = _object(companions, SPECIAL)
    special = names if special is None else special
    for record in (config, special):
        _set_end(record, tokenizer.special["eos"])
    config.pop("auto_map", None)  # asks for code; an import refuses it, a corpus's tokenizer does not need it
    if plain:
        config["tokenizer_class"] = PLAIN_CLASS
    for record in (config, special):
        _add_names(record, tokenizer.pauses)
    if isinstance(config.get("added_tokens_decoder"), dict):
        added = {str(entry["id"]): _flags(entry) for entry in tokenizer.document["added_tokens"]}
        config["added_tokens_decoder"] |= added
    _write(folder / CONFIG, config)
    _write(folder / SPECIAL, special)
    for name, content in companions.items():
        if name not in (CONFIG, SPECIAL, GENERATION):
            path = folder / place_of(name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def names_class(companions: Mapping[str, bytes]) -> bool:
    """Return whether the source's tokenizer class is named after a model, or follows from the model type."""
    config = _object(companions, CONFIG)
    return config is not None and config.get("tokenizer_class") not in (PLAIN_CLASS, *_CLASSES_OF_ONE_RELEASE)


def generation_config(
    companions: Mapping[str, bytes], special_ids: Mapping[str, int], pause_ids: Sequence[int], eod: int
) -> dict[str, Any]:
    """Return generation_config.json: the source's, with the end-of-document id added and the pauses suppressed.

    Args:
        companions: The source's files by name; may be empty.
        special_ids: Ids by role, used where the source has none.
        pause_ids: Ids that must not be emitted.
        eod: Id that ended documents and answers in training.

    Raises:
        CheckpointError: The source's file is not a JSON object.
    """
    source = _object(companions, GENERATION) or {}
    source.pop("_from_model_config", None)
    ids = {f"{role}_token_id": index for role, index in special_ids.items() if role != "unk"}
    ends = source.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [eod] if eod not in ends else []
    suppressed = source.get("suppress_tokens")
    suppressed = suppressed if isinstance(suppressed, list) else []
    return {
        **(ids if not source else {}),
        **source,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "suppress_tokens": sorted({*suppressed, *pause_ids}),
    }


def _object(companions: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    if name not in companions:
        return None
    try:
        content = json.loads(companions[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"tokenizer/{name}: expected JSON, got {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"tokenizer/{name}: expected a JSON object, got {type(content).__name__}")
    return content


def _set_end(record: dict[str, Any], name: str) -> None:
    """Make the end-of-document token of training the eos_token; keep the source's form of the same token."""
    known = record.get("eos_token")
    if (known.get("content") if isinstance(known, dict) else known) != name:
        record["eos_token"] = name


def _add_names(record: dict[str, Any], pauses: Sequence[str]) -> None:
    """Add the pauses to the list of special tokens, under the key that transformers 4 and 5 read.

    transformers 5 writes the list as extra_special_tokens, where 4 expects a dictionary of tokens by role and raises.
    """
    lists = [record.pop(key) for key in (_NAMES, _NAMES_OF_5) if isinstance(record.get(key), list)]
    names = lists[0] if lists else []
    known = [token.get("content") if isinstance(token, dict) else token for token in names]
    record[_NAMES] = [*names, *(name for name in pauses if name not in known)]


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}


def _write(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
