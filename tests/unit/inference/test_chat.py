"""A chat template that ends in the pauses, rendered and encoded only by transformers."""

from __future__ import annotations

import copy

import jinja2
import pytest
from support.tiny_llama import sentencepiece_tokenizer, write_folder

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import pause_chat_template, write_chat_template

MESSAGES = [{"role": "user", "content": "What is the state of the Union?"}]
OWN = """{%- for m in messages %}[{{ m['role'] }}] {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"""


def ids_of(tokenizer, messages=MESSAGES, **settings):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **settings)


def test_a_base_model_gets_the_text_and_the_pauses(sentencepiece):
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.chat_template = pause_chat_template(tokenizer, 10)
    prompt = tokenizer(MESSAGES[0]["content"])["input_ids"]
    assert ids_of(tokenizer) == prompt + [600] * 10
    assert ids_of(tokenizer, pauses=3) == prompt + [600] * 3
    assert ids_of(tokenizer, pauses=0) == prompt
    without = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False, return_dict=False)
    assert without == prompt
    lines = tokenizer.apply_chat_template([{"role": "system", "content": "a"}, *MESSAGES], tokenize=False)
    assert lines == "a\nWhat is the state of the Union?"


def test_a_bos_comes_first_where_the_tokenizer_puts_one(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path, bos=True)
    tokenizer.chat_template = pause_chat_template(tokenizer, 2)
    assert ids_of(tokenizer) == [*tokenizer(MESSAGES[0]["content"])["input_ids"], 600, 600]
    assert ids_of(tokenizer)[0] == tokenizer.bos_token_id


def test_a_model_with_a_template_keeps_it(sentencepiece):
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.chat_template = OWN
    before = ids_of(tokenizer)
    tokenizer.chat_template = pause_chat_template(tokenizer, 7)
    assert ids_of(tokenizer) == before + [600] * 7


def test_distinct_pauses_are_used_in_turn(sentencepiece):
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<pause_1>"]})
    tokenizer.chat_template = pause_chat_template(tokenizer, 5, ["<pause>", "<pause_1>"])
    assert ids_of(tokenizer)[-6:] == [ids_of(tokenizer, pauses=0)[-1], 600, 601, 600, 601, 600]


def test_a_message_cannot_smuggle_pauses_in(sentencepiece):
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.chat_template = pause_chat_template(tokenizer, 2)
    with pytest.raises(jinja2.TemplateError, match="a message spells <pause>"):
        ids_of(tokenizer, [{"role": "user", "content": "a <pause> b"}])


def test_it_is_next_to_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path / "out")
    path = write_chat_template(folder, 4)
    assert path.name == "chat_template.jinja"
    assert ids_of(AutoTokenizer.from_pretrained(str(folder)))[-5:].count(600) == 4
    with pytest.raises(DataError, match="appends pauses already"):
        write_chat_template(folder, 4)


def test_what_cannot_be_done_is_said(sentencepiece, tmp_path):
    with pytest.raises(ConfigError, match="pauses: expected 0 or more, got -1"):
        pause_chat_template(sentencepiece, -1)
    with pytest.raises(DataError, match="expected a special token <other>"):
        pause_chat_template(sentencepiece, 1, ["<pause>", "<other>"])
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        write_chat_template(tmp_path / "nothing", 1)
