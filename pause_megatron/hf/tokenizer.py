"""The tokenizer of an exported folder: the native ids, and `<pause>` as a special token at exactly the pause id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.tokenizer import DESCRIPTION_NAME, PAUSE_TOKEN, Tokenizer
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.sentencepiece_model import convert_bpe

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class HFTokenizer:
    """Attributes:
    document: content of tokenizer.json
    special: names of the "eos" token and, where there are any, of "bos", "unk" and "pad"
    special_ids: their ids
    pauses: names of the pause tokens, in the order of their ids
    """

    document: dict[str, Any]
    special: dict[str, str]
    special_ids: dict[str, int]
    pauses: tuple[str, ...]


def convert_tokenizer(folder: Path, tokenizer: Tokenizer, pause_ids: Sequence[int]) -> HFTokenizer:
    """Translates the tokenizer of a checkpoint.

    Args:
        folder: the checkpoint's `tokenizer/`
        tokenizer: what `load_tokenizer` made of it
        pause_ids: the K pause ids

    Raises:
        CheckpointError: it has no exact counterpart, or a pause id cannot be what `<pause>` encodes to.
    """
    if tokenizer.kind == "sentencepiece":
        path = folder / "tokenizer.model"
        document, special = convert_bpe(path.read_bytes(), str(path))
    else:
        document = json.loads((folder / "tokenizer.json").read_bytes())
        description = json.loads((folder / DESCRIPTION_NAME).read_bytes())
        special = {str(role): str(name) for role, name in description.get("special_tokens", {}).items()}
    return with_pauses(document, special, pause_ids, eod=tokenizer.eod, where=str(folder))


def pause_names(count: int) -> tuple[str, ...]:
    """Names of the pause tokens: "<pause>", "<pause_1>", "<pause_2>", ..."""
    return (PAUSE_TOKEN, *(f"{PAUSE_TOKEN[:-1]}_{number}{PAUSE_TOKEN[-1]}" for number in range(1, count)))


def pause_entry(names: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """How config.json's "pause" entry begins: the token, all of them where there are several, and their ids."""
    return {"token": names[0], "tokens": list(names), "ids": list(ids)}


def with_pauses(
    document: Mapping[str, Any], special: Mapping[str, str], pause_ids: Sequence[int], *, eod: int, where: str
) -> HFTokenizer:
    """Puts pause tokens at exactly these ids, filling gaps below them with special tokens that nothing uses.

    Args:
        document: content of a tokenizer.json
        special: names of special tokens by role
        pause_ids: where
        eod: id that ends a document; becomes the end-of-sequence token
        where: the tokenizer, for messages

    Raises:
        CheckpointError: not a tokenizer.json, or the ids do not come out as they must.
    """
    try:
        document = json.loads(json.dumps(document))  # a copy
        names = _names(document)
        wanted = _place(document, names, pause_ids)
        made = _open(document, where)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    vocabulary = made.get_vocab(with_added_tokens=True)
    different = [name for name in wanted if vocabulary.get(name) != wanted[name]]
    if different or len(set(vocabulary.values())) != len(vocabulary):
        name = different[0] if different else "(two of one id)"
        raise CheckpointError(
            f"{where}: expected {name!r} to have id {wanted.get(name)}, Hugging Face tokenizers give it "
            f"{vocabulary.get(name)}: ids with holes cannot be extended; reserve another pause id"
        )
    by_id = {index: name for name, index in vocabulary.items()}
    roles = {role: name for role, name in special.items() if name in vocabulary}
    if eod not in by_id:
        raise CheckpointError(f"{where}: the end-of-document id {eod} is no token of the tokenizer")
    roles["eos"] = by_id[eod]
    roles.setdefault("pad", roles["eos"])
    return HFTokenizer(
        document,
        roles,
        {role: vocabulary[name] for role, name in roles.items()},
        tuple(by_id[index] for index in pause_ids),
    )


def _names(document: Mapping[str, Any]) -> dict[int, str]:
    """Token by id, of the vocabulary and of the added tokens."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram
        names = {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
    else:
        names = {int(index): str(name) for name, index in vocabulary.items()}
    return names | {int(entry["id"]): str(entry["content"]) for entry in document["added_tokens"]}


def _place(document: dict[str, Any], names: dict[int, str], pause_ids: Sequence[int]) -> dict[str, int]:
    """Adds and renames tokens in the document; returns all of them with the ids that they must have."""
    added = {int(entry["id"]): entry for entry in document["added_tokens"]}
    for index, name in zip(pause_ids, pause_names(len(pause_ids)), strict=True):
        if names.get(index) != name:
            if name in names.values():
                raise ValueError(f"{name!r} is there already, and not at the pause id {index}")
            _rename(document, names.get(index), name)
        names[index] = name
        added[index] = {"id": index, "content": name, **_FLAGS}
    for index in range(max(pause_ids)):
        if index not in names:
            names[index] = f"<|unused_{index}|>"
            added[index] = {"id": index, "content": names[index], **_FLAGS}
    document["added_tokens"] = [added[index] for index in sorted(added)]
    return {name: index for index, name in names.items()}


def _rename(document: dict[str, Any], old: str | None, new: str) -> None:
    """Gives a reserved slot of the vocabulary (which no text reaches, so no merge names it) its new name."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[new] = vocabulary.pop(old)
    elif isinstance(vocabulary, list):
        document["model"]["vocab"] = [[new, *entry[1:]] if entry[0] == old else entry for entry in vocabulary]


def _open(document: Mapping[str, Any], where: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{where}: Hugging Face tokenizers do not take it ({error})") from None
