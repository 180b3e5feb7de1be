"""Documents of a shard, in order, and exact accounting of the lines that are none."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

PLACES_KEPT = 10
MAX_NESTING = 200
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

KINDS = {
    "blank-line": "nothing on the line",
    "too-long": "a line of more than 64 MiB",
    "invalid-utf8": "bytes that are not UTF-8",
    "null-bytes": "NUL bytes, as a writer that crashed, or UTF-16, leaves them",
    "not-json": "not one JSON value",
    "too-deep": "lists and objects nested more than 200 deep",
    "not-object": "JSON, but not an object",
    "no-text": "an object without the text key",
    "two-texts": "an object that has the text key twice",
    "text-not-string": "the text is null, a number, a list or an object",
    "empty": "the text is empty or only white space",
    "lone-surrogate": "the text holds half of a UTF-16 pair, which is no character",
    "damaged-shard": "the shard cannot be read from here on (compressed data ends or breaks, the disk fails)",
}


class Malformed(NamedTuple):
    """A line (or record) that is no document: its kind, its number from 1, and what stands there."""

    kind: str
    line: int
    detail: str


class Place(NamedTuple):
    """Where a malformed line stands."""

    file: str
    line: int
    detail: str


class Tally:
    """Counts of malformed lines by kind, and the first places of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[Place]] = {}

    def add(self, file: str, malformed: Malformed) -> None:
        """Count one line."""
        self.counts[malformed.kind] += 1
        self._keep(malformed.kind, [Place(file, malformed.line, malformed.detail)])

    def merge(self, other: Tally) -> None:
        """Add the counts of a later shard."""
        self.counts.update(other.counts)
        for kind, places in other.places.items():
            self._keep(kind, places)

    def _keep(self, kind: str, places: list[Place]) -> None:
        kept = self.places.setdefault(kind, [])
        kept.extend(places[: PLACES_KEPT - len(kept)])

    @property
    def total(self) -> int:
        """Malformed lines of all kinds."""
        return sum(self.counts.values())

    def describe(self, places: int = 3) -> str:
        """One line per kind: how many, what it means, and the first places."""
        lines = []
        for kind, count in sorted(self.counts.items()):
            first = "; ".join(
                f"{place.file}:{place.line} {place.detail}".rstrip() for place in self.places[kind][:places]
            )
            lines.append(f"  {kind}: {count:,} ({KINDS.get(kind, 'unknown')}); first: {first}")
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Plain values, kinds in alphabetical order."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "places": {kind: [list(place) for place in self.places[kind]] for kind in sorted(self.places)},
        }

    @classmethod
    def from_json(cls, value: dict) -> Tally:
        """The inverse of `to_json`."""
        tally = cls()
        tally.counts.update(value["counts"])
        tally.places = {kind: [Place(*place) for place in places] for kind, places in value["places"].items()}
        return tally


def parse_line(line: bytes | None, number: int, text_key: str) -> str | Malformed:
    """The document on one line of a JSON-lines shard.

    Args:
        line: without its newline; None for one that was too long to be read.
        number: of the line, from 1.
        text_key: key of the text.
    """
    if line is None:
        return Malformed("too-long", number, "")
    line = line.removeprefix(_BYTE_ORDER_MARK)  # at the start, or in the middle of files that were joined
    if not line.strip():
        return Malformed("blank-line", number, "")
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed("invalid-utf8", number, f"byte 0x{line[error.start]:02x} at column {error.start + 1}")
    if b"\0" in line:
        return Malformed("null-bytes", number, f"{line.count(0):,} of {len(line):,} bytes")
    # Told from the text, not by Python's recursion limit: that depends on who calls.
    if line.count(b"[") + line.count(b"{") > MAX_NESTING and (depth := _nesting(decoded)) > MAX_NESTING:
        return Malformed("too-deep", number, f"{depth:,} deep")
    try:
        value = json.loads(decoded)
    except ValueError as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return Malformed("not-json", number, f"{message}: {_shown(decoded)}")
    if not isinstance(value, dict):
        return Malformed("not-object", number, _shown(decoded))
    key = json.dumps(text_key, ensure_ascii=False)
    if decoded.count(key) > 1:
        pairs = json.loads(decoded, object_pairs_hook=list)
        if (times := [name for name, _ in pairs].count(text_key)) > 1:
            return Malformed("two-texts", number, f"{key} {times} times")
    return parse_record(value, number, text_key)


def parse_record(record: dict, number: int, text_key: str) -> str | Malformed:
    """The document in one record, or what is wrong with it."""
    if text_key not in record:
        return Malformed("no-text", number, f"no key {text_key!r}; keys: {_shown(', '.join(map(str, record)))}")
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
    """`parse_line` over a whole shard."""
    for number, line in enumerate(lines, start=1):
        yield parse_line(line, number, text_key)


def _nesting(text: str) -> int:
    """How deep the lists and objects of a JSON text are nested. Brackets inside strings do not count."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _shown(text: str) -> str:
    shortened = text if len(text) <= 40 else text[:40] + "..."
    return shortened.encode("utf-8", "backslashreplace").decode("utf-8")
