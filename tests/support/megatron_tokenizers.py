"""Tokenizers of megatron-core's own classes, made by the function that Megatron-LM's scripts call."""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from pathlib import Path

from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.hf.tokenizer import convert_tokenizer
from pause_megatron.hf.tokenizer_files import write_tokenizer
from support.prose import train_model

try:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
except ImportError:  # 0.16
    from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer

__all__ = ["build_tokenizer", "exported_folder", "tiktoken_file", "tokenizer_arguments"]


def tokenizer_arguments(**given: object) -> Namespace:
    """The tokenizer arguments of all releases, at their defaults, and what `build_tokenizer` reads besides."""
    defaults = {
        **{"rank": 0, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2},
        **{"vocab_size": None, "padded_vocab_size": None, "pad_vocab_size": True, "vocab_file": None},
        **{"merge_file": None, "tokenizer_model": None, "tokenizer_metadata": None, "metadata_path": None},
        **{"tokenizer_special_tokens": None, "special_tokens": None, "chat_template": None},
        **{"tokenizer_sentencepiece_legacy": False, "tokenizer_sentencepiece_ignore_extra_whitespaces": True},
        **{"tokenizer_hf_use_fast": True, "tokenizer_hf_include_special_tokens": True},
        **{"tokenizer_hf_no_use_fast": False, "tokenizer_hf_no_include_special_tokens": False},
        **{"tiktoken_pattern": "v2", "tiktoken_num_special_tokens": 1000, "trust_remote_code": False},
        **{"null_tokenizer_eod_id": None, "null_tokenizer_pad_id": -1},
    }
    return Namespace(**(defaults | given))


def exported_folder(folder: Path, pauses: int = 1) -> Path:
    """What export-hf makes of a SentencePiece model of 600 pieces: `<pause>`, `<pause_1>`, ... from id 600 on."""
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(train_model(folder / "tokenizer.model"))
    tokenizer.save(folder / "native")
    hf = folder / "hf"
    hf.mkdir()
    pause_ids = range(tokenizer.pause_id, tokenizer.pause_id + pauses)
    made = convert_tokenizer(folder / "native", tokenizer, pause_ids)
    write_tokenizer(hf, made, {}, sequence_length=64, plain=True)
    (hf / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return hf


def tiktoken_file(path: Path, merges: tuple[bytes, ...] = ()) -> Path:
    """A vocabulary of bytes and a few merges, as megatron-core's TikTokenTokenizer reads it."""
    tokens = [bytes([value]) for value in range(256)] + list(merges)
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
