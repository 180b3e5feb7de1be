"""Malformed lines: each has its kind, none is lost, none raises, and good documents are untouched by them."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prose import documents

from pause_megatron.data.documents import KINDS, PLACES_KEPT, Malformed, Tally, parse_line, parse_lines

BAD_LINES = [
    (b"", "blank-line"),
    (b"  \t\r", "blank-line"),
    (b'{"text": "caf\xe9"}', "invalid-utf8"),
    (b'{"text": "\xed\xa0\x80"}', "invalid-utf8"),
    (b"\xff\xfe{\x00", "invalid-utf8"),
    (b"not json", "not-json"),
    (b'{"text": "cut', "not-json"),
    (b'{"text": "two"} {"text": "values"}', "not-json"),
    (b"{'text': 'python'}", "not-json"),
    (b'{"text": "control \x01"}', "not-json"),
    (b'{"text": "bad \\x escape"}', "not-json"),
    (b"[" * 100_000, "not-json"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not-json"),
    (b"null", "not-object"),
    (b"[]", "not-object"),
    (b'"text"', "not-object"),
    (b"{}", "no-text"),
    (b'{"Text": "case"}', "no-text"),
    (b'{"text": null}', "text-not-string"),
    (b'{"text": 7}', "text-not-string"),
    (b'{"text": ["a"]}', "text-not-string"),
    (b'{"text": {"a": 1}}', "text-not-string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b'{"text": "half \\ud83d pair"}', "lone-surrogate"),
    (None, "too-long"),
]


@pytest.mark.parametrize(("line", "kind"), BAD_LINES)
def test_kinds(line: bytes | None, kind: str) -> None:
    malformed = parse_line(line, 7, "text")
    assert isinstance(malformed, Malformed)
    assert (malformed.kind, malformed.line) == (kind, 7)
    assert kind in KINDS
    assert len(malformed.detail) < 200
    malformed.detail.encode()  # can be printed


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: not text.isspace()))
def test_good_text_comes_back(text: str) -> None:
    for ascii_only in (True, False):
        assert parse_line(json.dumps({"text": text}, ensure_ascii=ascii_only).encode(), 1, "text") == text


@settings(max_examples=300, deadline=None)
@given(line=st.binary(max_size=40))
def test_no_line_raises(line: bytes) -> None:
    assert isinstance(parse_line(line, 1, "text"), str | Malformed)


def test_byte_order_mark_and_other_key() -> None:
    assert parse_line(b'\xef\xbb\xbf{"content": "x"}\r', 1, "content") == "x"


def test_ten_thousand_malformed_lines_among_as_many_good_ones() -> None:
    rng = random.Random(0)
    good = [(json.dumps({"text": text}).encode(), None) for text in documents(500)] * 20
    lines = good + [rng.choice(BAD_LINES) for _ in good]
    rng.shuffle(lines)
    tally, texts = Tally(), []
    for result in parse_lines((line for line, _ in lines), "text"):
        if isinstance(result, Malformed):
            tally.add("shard", result)
            assert lines[result.line - 1][1] == result.kind
        else:
            texts.append(result)
    kinds = [kind for _, kind in lines if kind]
    assert tally.counts == {kind: kinds.count(kind) for kind in set(kinds)}
    assert texts == [json.loads(line)["text"] for line, kind in lines if kind is None]


def test_tallies_add_up_and_keep_the_first_places() -> None:
    one, two = Tally(), Tally()
    for number in range(PLACES_KEPT - 2):
        one.add("a", Malformed("empty", number, ""))
    for number in range(5):
        two.add("b", Malformed("empty", number, "x"))
        two.add("b", Malformed("no-text", number, ""))
    one.merge(two)
    assert one.total == PLACES_KEPT - 2 + 10
    assert [place.file for place in one.places["empty"]] == ["a"] * (PLACES_KEPT - 2) + ["b"] * 2
    again = Tally.from_json(json.loads(json.dumps(one.to_json())))
    assert (again.counts, again.places) == (one.counts, one.places)
    assert "no-text: 5 (an object without the text key); first: b:0" in one.describe()
