"""Conversion of tokenizers for gigatoken, for the kinds whose ids it provably reproduces.

gigatoken reads a Hugging Face `tokenizer.json`. It matches special tokens inside text and cannot disable that, so they
are removed: then a literal "</s>" is encoded as text, as everywhere else in this project.

The accepted kinds are compared on real and on adversarial text (tests/unit/data/tokenizer/test_encoders.py). Ids are
known to differ where a model normalizes Unicode, joins spaces, or has user-defined symbols.
"""

from __future__ import annotations

import json
from typing import Any

from pause_megatron.data.tokenizer.fast.sentencepiece_proto import (
    BPE,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges,
    parse_model,
)
from pause_megatron.errors import DataError

# Regular expressions of the pre-tokenizers of Llama 3 (and GPT-4) and Qwen 2.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = (_LLAMA_3, _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"))


def gigatoken_document(kind: str, content: bytes) -> str:
    """Return a `tokenizer.json` with which gigatoken gives the tokenizer's ids for every text.

    Args:
        kind: Kind of the tokenizer, "sentencepiece" or "huggingface".
        content: Bytes of its file.

    Raises:
        DataError: Equal ids are not proven for this kind of tokenizer; the message says why.
    """
    document = _of_sentencepiece(content) if kind == "sentencepiece" else _of_hugging_face(json.loads(content))
    return json.dumps(document, ensure_ascii=False)


def _of_sentencepiece(content: bytes) -> dict[str, Any]:
    model = parse_model(content, "model")
    norm, types = model.normalizer_spec, {piece.type for piece in model.pieces}
    _refuse(
        {
            "a SentencePiece model of another type than BPE": model.trainer_spec.model_type != BPE,
            "a SentencePiece model without byte fallback": not model.trainer_spec.byte_fallback,
            "a SentencePiece model that normalizes Unicode": bool(norm.precompiled_charsmap),
            "a SentencePiece model that removes extra whitespaces": norm.remove_extra_whitespaces,
            "a SentencePiece model that does not escape whitespaces": not norm.escape_whitespaces,
            "a SentencePiece model with whitespace as suffix": model.trainer_spec.treat_whitespace_as_suffix,
            "a SentencePiece model with user-defined symbols": USER_DEFINED in types,
            "a SentencePiece model with unused pieces": UNUSED in types,
        }
    )
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if norm.add_dummy_prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    bpe = {
        "type": "BPE",
        "unk_token": next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), None),
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
        "merges": merges(model.pieces),
    }
    return _document(bpe, normalizer={"type": "Sequence", "normalizers": spaces}, pre_tokenizer=None)


def _of_hugging_face(document: dict[str, Any]) -> dict[str, Any]:
    model = document["model"]
    _refuse(
        {
            "a model of another type than BPE": model.get("type") != "BPE",
            "a model with byte fallback": bool(model.get("byte_fallback")),
            "a model with dropout": bool(model.get("dropout")),
            "a model with subword prefixes or suffixes": bool(
                model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
            ),
            "a normalizer": document.get("normalizer") is not None,
            'tokens added without "special": true': any(
                not token.get("special") for token in document.get("added_tokens", [])
            ),
            "another pre-tokenizer than GPT-2's, Llama 3's or Qwen 2's": not _is_known(document.get("pre_tokenizer")),
        }
    )
    return _document(model, normalizer=None, pre_tokenizer=document["pre_tokenizer"])


def _is_known(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", **options}:
            return bool(options.get("use_regex", True))
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return split in SPLITS
    return False


def _document(model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    return {"version": "1.0", "added_tokens": [], "post_processor": None, "decoder": None, **steps, "model": model}


def _refuse(reasons: dict[str, bool]) -> None:
    for reason, applies in reasons.items():
        if applies:
            raise DataError(f"gigatoken is not proven to give equal ids for {reason}")
