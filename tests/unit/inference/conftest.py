"""Tokenizers and models that the tests of a session share."""

from __future__ import annotations

import pytest
from support.tiny_llama import byte_level_tokenizer, llama, sentencepiece_tokenizer

from pause_megatron.inference import PauseGenerator


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    return byte_level_tokenizer(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def generator(sentencepiece):
    return PauseGenerator(llama(len(sentencepiece)), sentencepiece)
