"""Malformed lines: each has its kind, none is lost, none raises, and good documents are untouched by them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.malformed import BAD_LINES

from pause_megatron.data.text.documents import KINDS, PLACES_KEPT, Malformed, Tally, TallyRecord, parse_line


@pytest.mark.parametrize(("line", "kind"), [*BAD_LINES, (None, "too-long")])
def test_kinds(line: bytes | None, kind: str) -> None:
    malformed = parse_line(line, 7, "text")
    assert isinstance(malformed, Malformed)
    assert (malformed.kind, malformed.line) == (kind, 7)
    assert kind in KINDS
    assert len(malformed.detail) < 200
    malformed.detail.encode()  # can be printed


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: not text.isspace()))
def test_good_text_comes_back(text: str) -> None:
    for ascii_only in (True, False):
        assert parse_line(json.dumps({"text": text}, ensure_ascii=ascii_only).encode(), 1, "text") == text


@settings(max_examples=300)
@given(line=st.binary(max_size=40))
def test_no_line_raises(line: bytes) -> None:
    assert isinstance(parse_line(line, 1, "text"), str | Malformed)


def test_byte_order_mark_and_other_key() -> None:
    assert parse_line(b'\xef\xbb\xbf{"content": "x"}\r', 1, "content") == "x"


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
    again = Tally.from_record(TallyRecord.model_validate_json(one.to_record().model_dump_json()))
    assert (again.counts, again.places) == (one.counts, one.places)
    assert "no-text: 5 (an object without the text key); first: b:0" in one.describe()
