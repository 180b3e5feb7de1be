"""Tokenizer of an exported folder: the native ids, and `<pause>` as a special token at exactly the pause id."""

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
    """A converted tokenizer.

    Attributes:
        document: Content of tokenizer.json.
        special: Names of the special tokens by role: "eos", and "bos", "unk" and "pad" where they exist.
        special_ids: Ids of the special tokens by role.
        pauses: Names of the pause tokens, in the order of their ids.
    """

    document: dict[str, Any]
    special: dict[str, str]
    special_ids: dict[str, int]
    pauses: tuple[str, ...]


def convert_tokenizer(folder: Path, tokenizer: Tokenizer, pause_ids: Sequence[int]) -> HFTokenizer:
    """Convert the tokenizer of a checkpoint.

    Args:
        folder: The checkpoint's `tokenizer/`.
        tokenizer: The loaded tokenizer.
        pause_ids: The K pause ids.

    Raises:
        CheckpointError: The tokenizer has no exact counterpart, or `<pause>` cannot have the pause id.
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
    """Return the names of `count` pause tokens: "<pause>", "<pause_1>", "<pause_2>", ..."""
    return (PAUSE_TOKEN, *(f"{PAUSE_TOKEN[:-1]}_{number}{PAUSE_TOKEN[-1]}" for number in range(1, count)))


def pause_entry(names: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """Return the tokens and their ids as the "pause" entry of config.json has them."""
    return {"token": names[0], "tokens": list(names), "ids": list(ids)}


def with_pauses(
    document: Mapping[str, Any], special: Mapping[str, str], pause_ids: Sequence[int], *, eod: int, where: str
) -> HFTokenizer:
    """Add pause tokens at exactly these ids, and unused special tokens at gaps below them.

    Args:
        document: Content of a tokenizer.json.
        special: Names of special tokens by role.
        pause_ids: The K pause ids.
        eod: Id of the end-of-document token, which becomes the end-of-sequence token.
        where: Names the tokenizer in messages.

    Raises:
        CheckpointError: Not a tokenizer.json, or tokens do not get the expected ids.
    """
    try:
        extended: dict[str, Any] = json.loads(json.dumps(document))  # a copy
        _close_gaps(extended, where)
        expected = _add_pauses(extended, _names(extended), pause_ids)
        tokenizer = _open(extended, where)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    different = [name for name in expected if vocabulary.get(name) != expected[name]]
    if different or len(set(vocabulary.values())) != len(vocabulary):
        name = different[0] if different else "(two of one id)"
        raise CheckpointError(
            f"{where}: expected {name!r} to have id {expected.get(name)}, got {vocabulary.get(name)} from Hugging Face "
            "tokenizers: ids with gaps cannot be extended; reserve another pause id"
        )
    by_id = {index: name for name, index in vocabulary.items()}
    roles = {role: name for role, name in special.items() if name in vocabulary}
    if eod not in by_id:
        raise CheckpointError(f"{where}: expected a token with the end-of-document id {eod}, got none")
    roles["eos"] = by_id[eod]
    roles.setdefault("pad", roles["eos"])
    return HFTokenizer(
        extended,
        roles,
        {role: vocabulary[name] for role, name in roles.items()},
        tuple(by_id[index] for index in pause_ids),
    )


def _close_gaps(document: dict[str, Any], where: str) -> None:
    """Give the added tokens the ids that the tokenizers library gives them, which leaves no gap between new tokens."""
    names = _names(document)
    if len(names) != 1 + max(names):
        ids = _open(document, where).get_vocab(with_added_tokens=True)
        for entry in document["added_tokens"]:
            entry["id"] = ids[entry["content"]]


def _names(document: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens by id, of the vocabulary and of the added tokens."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram
        names = {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
    else:
        names = {int(index): str(name) for name, index in vocabulary.items()}
    return names | {int(entry["id"]): str(entry["content"]) for entry in document["added_tokens"]}


def _add_pauses(document: dict[str, Any], names: dict[int, str], pause_ids: Sequence[int]) -> dict[str, int]:
    """Add and rename tokens in the document. Return the expected id of every token."""
    added = {int(entry["id"]): entry for entry in document["added_tokens"]}
    for index, name in zip(pause_ids, pause_names(len(pause_ids)), strict=True):
        if names.get(index) != name:
            if name in names.values():
                raise ValueError(f"expected {name!r} at the pause id {index}, got it at another id")
            _rename(document, names.get(index), name)
        names[index] = name
        added[index] = {"id": index, "content": name, **_FLAGS}
    vocabulary = document["model"]["vocab"]
    pieces = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else -1
    for index in range(max(pause_ids)):
        if index not in names:
            names[index] = f"<|unused_{index}|>"
            added[index] = {"id": index, "content": names[index], **_FLAGS}
            if index < pieces:  # the library numbers added tokens from the number of pieces on
                vocabulary[names[index]] = index
    document["added_tokens"] = [added[index] for index in sorted(added)]
    return {name: index for index, name in names.items()}


def _rename(document: dict[str, Any], old: str | None, new: str) -> None:
    """Rename a reserved slot of the vocabulary. No text is encoded to it, so no merge has its name."""
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
        raise CheckpointError(f"{where}: Hugging Face tokenizers cannot load it ({error})") from None
