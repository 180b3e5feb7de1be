"""Parser of JSON lines into documents, and an exact tally of malformed lines by kind."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

PLACES_KEPT = 10
"""Locations that a `Tally` keeps for each kind of malformed line."""

MAX_NESTING = 200
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

KINDS = {
    "blank-line": "the line is empty",
    "too-long": "a line of more than 64 MiB",
    "invalid-utf8": "bytes that are not UTF-8",
    "null-bytes": "NUL bytes, as a crashed writer or UTF-16 leaves them",
    "not-json": "not one JSON value",
    "too-deep": "lists and objects nested more than 200 deep",
    "not-object": "JSON, but not an object",
    "no-text": "an object without the text key",
    "two-texts": "an object that has the text key twice",
    "text-not-string": "the text is null, a number, a list or an object",
    "empty": "the text is empty or only white space",
    "lone-surrogate": "the text contains half of a UTF-16 surrogate pair",
    "damaged-shard": "the shard cannot be read from here on (compressed data ends or breaks, the disk fails)",
}


class Malformed(NamedTuple):
    """A line or record that is not a document.

    Attributes:
        kind: One of `KINDS`.
        line: Number of the line, from 1.
        detail: Excerpt of the line or what is wrong with it, for messages; may be empty.
    """

    kind: str
    line: int
    detail: str


class LineLocation(NamedTuple):
    """The location of a malformed line.

    Attributes:
        file: Path of the shard, or name of the source.
        line: Number of the line, from 1.
        detail: Excerpt of the line or what is wrong with it, for messages; may be empty.
    """

    file: str
    line: int
    detail: str


class TallyRecord(BaseModel):
    """A `Tally` as it is stored in PREFIX.parts/.

    Attributes:
        counts: Number of malformed lines by kind.
        places: The first locations of malformed lines by kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    counts: dict[str, int]
    places: dict[str, list[LineLocation]]


class Tally:
    """Counts of malformed lines by kind, with the first locations of each kind.

    Attributes:
        counts: Number of malformed lines by kind.
        places: The first `PLACES_KEPT` locations by kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[LineLocation]] = {}

    def add(self, file: str, malformed: Malformed) -> None:
        """Count one malformed line.

        Args:
            file: Path of the shard, or name of the source.
            malformed: The malformed line.
        """
        self.counts[malformed.kind] += 1
        self._keep(malformed.kind, [LineLocation(file, malformed.line, malformed.detail)])

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally, whose shards come later."""
        self.counts.update(other.counts)
        for kind, places in other.places.items():
            self._keep(kind, places)

    def _keep(self, kind: str, places: list[LineLocation]) -> None:
        kept = self.places.setdefault(kind, [])
        kept.extend(places[: PLACES_KEPT - len(kept)])

    @property
    def total(self) -> int:
        """Number of malformed lines of all kinds."""
        return sum(self.counts.values())

    def describe(self, places: int = 3) -> str:
        """Return a report with one line per kind: its count, its meaning and its first locations.

        Args:
            places: Number of locations to list for each kind.
        """
        lines = []
        for kind, count in sorted(self.counts.items()):
            first = "; ".join(
                f"{place.file}:{place.line} {place.detail}".rstrip() for place in self.places[kind][:places]
            )
            lines.append(f"  {kind}: {count:,} ({KINDS.get(kind, 'unknown')}); first: {first}")
        return "\n".join(lines)

    def to_record(self) -> TallyRecord:
        """Return the record of the tally, kinds in alphabetical order."""
        return TallyRecord(
            counts=dict(sorted(self.counts.items())), places={kind: self.places[kind] for kind in sorted(self.places)}
        )

    @classmethod
    def from_record(cls, record: TallyRecord) -> Tally:
        """Return the tally of a record."""
        tally = cls()
        tally.counts.update(record.counts)
        tally.places = {kind: [*places] for kind, places in record.places.items()}
        return tally


def parse_line(line: bytes | None, number: int, text_key: str) -> str | Malformed:
    """Parse one line of a JSON-lines shard.

    Args:
        line: The line without its newline; None for a line that exceeds `MAX_LINE_BYTES`.
        number: Number of the line, from 1.
        text_key: Key of the text in the JSON object.

    Returns:
        The text of the document, or the reason why the line is malformed.
    """
    if line is None:
        return Malformed("too-long", number, "")
    line = line.removeprefix(_BYTE_ORDER_MARK)  # at the start of the file, or inside concatenated files
    if not line.strip():
        return Malformed("blank-line", number, "")
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed("invalid-utf8", number, f"byte 0x{line[error.start]:02x} at column {error.start + 1}")
    if b"\0" in line:
        return Malformed("null-bytes", number, f"{line.count(0):,} of {len(line):,} bytes")
    # Counted in the text: Python's recursion limit depends on the depth of the caller's stack.
    if line.count(b"[") + line.count(b"{") > MAX_NESTING and (depth := _nesting(decoded)) > MAX_NESTING:
        return Malformed("too-deep", number, f"{depth:,} deep")
    try:
        value = json.loads(decoded)
    except ValueError as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return Malformed("not-json", number, f"{message}: {_shortened(decoded)}")
    if not isinstance(value, dict):
        return Malformed("not-object", number, _shortened(decoded))
    key = json.dumps(text_key, ensure_ascii=False)
    if decoded.count(key) > 1:
        pairs = json.loads(decoded, object_pairs_hook=list)
        if (times := [name for name, _ in pairs].count(text_key)) > 1:
            return Malformed("two-texts", number, f"{key} {times} times")
    return parse_record(value, number, text_key)


def parse_record(record: Mapping[str, Any], number: int, text_key: str) -> str | Malformed:
    """Check one record and return its text.

    Args:
        record: A JSON object, or a row of a Hugging Face dataset.
        number: Number of the record, from 1.
        text_key: Key of the text in the record.

    Returns:
        The text of the document, or the reason why the record is malformed.
    """
    if text_key not in record:
        return Malformed("no-text", number, f"no key {text_key!r}; keys: {_shortened(', '.join(map(str, record)))}")
    text = record[text_key]
    if not isinstance(text, str):
        return Malformed("text-not-string", number, f"{text_key!r} is {type(text).__name__}")
    if not text or text.isspace():
        return Malformed("empty", number, "")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Malformed("lone-surrogate", number, f"U+{ord(text[error.start]):04X} at character {error.start}")
    return text


def parse_lines(lines: Iterator[bytes | None], text_key: str) -> Iterator[str | Malformed]:
    """Yield the result of `parse_line` for each line of a shard.

    Args:
        lines: Lines without their newlines; None for a line that exceeds `MAX_LINE_BYTES`.
        text_key: Key of the text in the JSON objects.
    """
    for number, line in enumerate(lines, start=1):
        yield parse_line(line, number, text_key)


def _nesting(text: str) -> int:
    """Return how deep lists and objects of a JSON text are nested, ignoring brackets inside strings."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _shortened(text: str) -> str:
    shortened = text if len(text) <= 40 else text[:40] + "..."
    return shortened.encode("utf-8", "backslashreplace").decode("utf-8")
