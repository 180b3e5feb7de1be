"""Conversion of a SentencePiece BPE model to a Hugging Face `tokenizer.json` that gives the same ids.

The conversion of transformers also accepts models that it does not convert exactly: a Unigram model loads, but encodes
nearly every line differently. It treats text after a special token as the start of a sentence, so an answer after
`<pause>` would begin with a doubled space. This conversion is exact or raises. Every export checks it on real text
(`hf.parity`).
"""

from __future__ import annotations

from typing import Any

from pause_megatron.data.tokenizer.fast.sentencepiece_proto import (
    BPE,
    CONTROL,
    MODEL_TYPES,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges,
    parse_model,
)
from pause_megatron.errors import CheckpointError, DataError


def convert_bpe(content: bytes, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert a `.model` file.

    Args:
        content: Bytes of the file.
        where: Names the file in messages.

    Returns:
        The content of tokenizer.json, and the names of its "unk", "bos", "eos" and "pad" pieces by role.

    Raises:
        CheckpointError: Not a SentencePiece model, or of a type that Hugging Face tokenizers do not reproduce exactly.
    """
    model = _parse(content, where)
    pieces = list(model.pieces)
    spec, norm = model.trainer_spec, model.normalizer_spec
    names = [piece.piece for piece in pieces]
    added = [
        _added_token(index, piece.piece, special=piece.type != USER_DEFINED)
        for index, piece in enumerate(pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(norm),
        "pre_tokenizer": _pre_tokenizer(norm),
        "post_processor": None,
        "decoder": _decoder(norm),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece.piece for piece in pieces if piece.type == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(spec.byte_fallback),
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": merges(pieces),
        },
    }
    ids = {"unk": spec.unk_id, "bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id}
    return document, {role: names[index] for role, index in ids.items() if 0 <= index < len(names)}


def _parse(content: bytes, where: str) -> Any:
    try:
        model = parse_model(content, where)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    kind = model.trainer_spec.model_type
    if kind != BPE:
        raise CheckpointError(
            f"{where}: expected a SentencePiece model of type BPE, got {MODEL_TYPES.get(kind, kind)}. Hugging Face "
            "tokenizers do not reproduce the ids of a Unigram, word or char model; train BPE (pause-megatron "
            "train-tokenizer does)"
        )
    for name, present in (
        ("treat_whitespace_as_suffix", model.trainer_spec.treat_whitespace_as_suffix),
        ("escape_whitespaces=false", not model.normalizer_spec.escape_whitespaces),
        ("unused pieces", any(piece.type == UNUSED for piece in model.pieces)),
    ):
        if present:
            raise CheckpointError(f"{where}: expected a SentencePiece model that converts exactly, got one with {name}")
    return model


def _normalizer(norm: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if norm.precompiled_charsmap:
        import base64

        charsmap = base64.b64encode(norm.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if norm.remove_extra_whitespaces:
        steps += [_replace({"Regex": " +$"}, ""), _replace({"Regex": " {2,}"}, " ")]
    steps.append(_replace({"String": " "}, SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(norm: Any) -> dict[str, Any] | None:
    """Return the step that adds SentencePiece's space before a text: at its start only, not after special tokens."""
    if not norm.add_dummy_prefix:
        return None
    if norm.remove_extra_whitespaces:
        return _metaspace(SPACE, "first")  # adds none before a space: as if stripped and added again
    # The first step looks for a plain space. The normalizer has replaced all of them, so it always adds one.
    steps = [_metaspace(" ", "first"), _metaspace(SPACE, "never")]
    return {"type": "Sequence", "pretokenizers": steps}


def _decoder(norm: Any) -> dict[str, Any]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if norm.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace(replacement: str, scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}


def _added_token(index: int, name: str, *, special: bool) -> dict[str, Any]:
    content = name if special else name.replace(SPACE, " ")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}
