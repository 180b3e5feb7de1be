"""Text of an answer: joined to its prompt, streamed without guesses, cut at stop texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prose import documents

from pause_megatron.inference.answer import Answer
from pause_megatron.inference.limits import Limits
from pause_megatron.inference.prompts import PauseInfo, PromptEncoder

TEXTS = [
    " the Union — 2nd",
    "'s strength.\n\nNext\tline",
    " \N{CJK UNIFIED IDEOGRAPH-4E2D}\N{PILE OF POO}e\u0301",
    "  two",
]


@pytest.fixture(scope="session", params=["sentencepiece", "byte_level"])
def encoder(request):
    tokenizer = request.getfixturevalue(request.param)
    return PromptEncoder(tokenizer, PauseInfo(range(len(tokenizer) - 1, len(tokenizer))))


def pieces(encoder, ids, *, stop=(), eos=(2,), limit=10_000):
    answer = Answer(encoder, eos, Limits(max_new_tokens=limit, stop=stop))
    given_out = []
    for token_id in ids:
        given_out.append(answer.push(token_id))
        if answer.finish:
            break
    assert "".join(given_out) == answer.text
    return answer, given_out


def test_a_continuation_decodes_to_itself(encoder):
    """Cut real documents anywhere: prompt + decoded continuation is the document."""
    for number, document in enumerate(documents(60)):
        cut = 20 + 7 * number % 100
        prompt, text = document[:cut], document[cut : cut + 150]
        ids = encoder.encode_continuation(text)
        assert prompt + encoder.decode_continuation(ids) == prompt + text
        answer, given_out = pieces(encoder, [*ids, 2])
        assert answer.text == text and answer.finish == "eos" and answer.ids == ids
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given_out)


@pytest.mark.parametrize("text", TEXTS)
def test_unusual_text_streams_whole_characters(encoder, text):
    answer, given_out = pieces(encoder, [*encoder.encode_continuation(text), 2])
    assert answer.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given_out)


def test_an_answer_keeps_the_space_of_its_first_piece(sentencepiece):
    encoder = PromptEncoder(sentencepiece, PauseInfo(range(600, 601)))
    ids = encoder.encode_continuation(" the people")
    assert sentencepiece.convert_ids_to_tokens(ids)[0].startswith("▁")
    assert encoder.decode_continuation(ids) == " the people"
    assert not sentencepiece.convert_ids_to_tokens(encoder.encode_continuation("ing"))[0].startswith("▁")


@given(ids=st.lists(st.integers(3, 599), max_size=40), limit=st.integers(1, 40))
@settings(max_examples=100)
def test_pieces_of_any_tokens_join_to_the_text(encoder, ids, limit):
    answer, _ = pieces(encoder, ids, limit=limit)
    assert answer.ids == ids[:limit]
    assert answer.finish == ("length" if len(ids) >= limit else "")


@given(ids=st.lists(st.integers(259, 599), min_size=1, max_size=40))
@settings(max_examples=100)
def test_tokens_that_are_whole_characters_stream_as_they_decode(sentencepiece, ids):
    encoder = PromptEncoder(sentencepiece, PauseInfo(range(600, 601)))
    answer, given_out = pieces(encoder, ids, limit=len(ids))
    assert answer.text == encoder.decode_continuation(ids)
    assert all(given_out)


def test_special_tokens_are_not_shown(encoder):
    pause = encoder.pause.ids.start
    ids = encoder.encode_continuation(" the Union")
    assert encoder.decode_continuation([pause, *ids, pause]) == " the Union"


@given(data=st.data())
@settings(max_examples=100)
def test_a_stop_text_is_never_shown(encoder, data):
    document = documents(10)[data.draw(st.integers(0, 9))][:200]
    start = data.draw(st.integers(1, 190))
    stop = document[start : start + data.draw(st.integers(1, 9))]
    ids = encoder.encode_continuation(document)
    answer, given_out = pieces(encoder, ids, stop=[stop, "\0never\0"])
    assert answer.finish == "stop"
    assert answer.text == document[: document.index(stop)]
    assert stop not in "".join(given_out)


def test_half_a_stop_text_at_the_end_is_shown(encoder):
    answer, _ = pieces(encoder, [*encoder.encode_continuation(" thank you. END"), 2], stop=["ENDING"])
    assert answer.text == " thank you. END"
