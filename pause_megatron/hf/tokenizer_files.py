"""Files beside tokenizer.json in an export: the source's own, equal but for the pauses, or plain ones of our making."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.companions import CONFIG, GENERATION, SPECIAL, place_of
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.tokenizer import HFTokenizer

# Reads tokenizer.json as it stands; the classes named after models rebuild parts of it.
PLAIN_CLASS = "PreTrainedTokenizerFast"
_CLASSES_OF_ONE_RELEASE = ("TokenizersBackend",)  # what transformers 5 calls it, which 4 does not know
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def write_tokenizer(
    folder: Path, tokenizer: HFTokenizer, companions: Mapping[str, bytes], *, sequence_length: int, plain: bool
) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat templates.

    Args:
        folder: the export
        tokenizer: with its pauses
        companions: the source's own files, see `data/tokenizer/companions.py`; may be none
        sequence_length: model_max_length where the source says none
        plain: let transformers read tokenizer.json as it stands, whatever class the source names

    Raises:
        CheckpointError: a companion that is no JSON object.
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
    config.pop("auto_map", None)  # code; an import refuses it, a corpus's tokenizer has no use for it
    if plain:
        config["tokenizer_class"] = PLAIN_CLASS
    _add_names(config, tokenizer.pauses, otherwise="extra_special_tokens")
    _add_names(special, tokenizer.pauses, otherwise="additional_special_tokens")
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
    """Whether the source's tokenizer is of a class named after a model, or leaves the class to the model's type."""
    config = _object(companions, CONFIG)
    return config is not None and config.get("tokenizer_class") not in (PLAIN_CLASS, *_CLASSES_OF_ONE_RELEASE)


def generation_config(
    companions: Mapping[str, bytes], special_ids: Mapping[str, int], pause_ids: Sequence[int], eod: int
) -> dict[str, Any]:
    """generation_config.json: the source's own, every end of an answer among it, with the pauses suppressed.

    Args:
        companions: the source's own files; may be none
        special_ids: ids by role, where the source says none
        pause_ids: what must not be emitted
        eod: id that ended documents and answers in training
    """
    found = _object(companions, GENERATION) or {}
    found.pop("_from_model_config", None)
    ids = {f"{role}_token_id": index for role, index in special_ids.items() if role != "unk"}
    ends = found.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [eod] if eod not in ends else []
    suppressed = found.get("suppress_tokens")
    suppressed = suppressed if isinstance(suppressed, list) else []
    return {
        **(ids if not found else {}),
        **found,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "suppress_tokens": sorted({*suppressed, *pause_ids}),
    }


def _object(companions: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    if name not in companions:
        return None
    try:
        found = json.loads(companions[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"tokenizer/{name}: expected JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"tokenizer/{name}: expected a JSON object, got {type(found).__name__}")
    return found


def _set_end(record: dict[str, Any], name: str) -> None:
    """The token that ended documents in training is the end of sequence, in the form that the source has."""
    known = record.get("eos_token")
    if (known.get("content") if isinstance(known, dict) else known) != name:
        record["eos_token"] = name


def _add_names(record: dict[str, Any], pauses: Sequence[str], *, otherwise: str) -> None:
    key = next((key for key in _LISTS if isinstance(record.get(key), list)), None)
    if key is None:  # a dictionary there has names for some tokens: it stays
        key = otherwise if otherwise not in record else next(key for key in _LISTS if key != otherwise)
        record[key] = []
    known = [token.get("content") if isinstance(token, dict) else token for token in record[key]]
    record[key] = [*record[key], *(name for name in pauses if name not in known)]


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}


def _write(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
