"""A run whose model only Qwen2 has is refused at its start with a tokenizer that transformers would not read there."""

from __future__ import annotations

import pytest
from support.prose import small_tokenizer, train_hugging_face
from support.tiny_config import tiny_config

from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import ConfigError
from pause_megatron.hf.exportable import check_exportable

WINDOWS = ("model.qkv_bias=true", "model.sliding_window=16")


def test_another_tokenizer_is_refused_by_the_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"^model.qkv_bias, model.sliding_window: expected the tokenizer of Qwen2"):
        check_exportable(tiny_config(*WINDOWS), lambda: small_tokenizer(tmp_path))


def test_what_can_be_exported_passes(tmp_path):
    other = small_tokenizer(tmp_path)
    for options in ((), WINDOWS[:1], WINDOWS[1:]):
        check_exportable(tiny_config(*options), lambda: other)
    bytes_of_words = load_tokenizer(train_hugging_face(tmp_path / "byte-level"))  # as Qwen2's
    check_exportable(tiny_config(*WINDOWS), lambda: bytes_of_words)
