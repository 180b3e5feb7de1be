"""metrics.jsonl as it may be after crashes, full disks and editors: what can be read of it, and what a resume keeps.

A line is good when it is a JSON object of at most `LONGEST_LINE` bytes, ended by a newline, with a positive integer
`step`. Whatever else stands in the file is passed over by who reads, and kept aside by who goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pause_megatron.errors import DataError

NAME = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"
LONGEST_LINE = 1 << 20
"""Bytes. A step's line has some hundreds, and about fifty more for each corpus of a blend."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """Attributes:
    records: the good lines, in the file's order
    damaged: number of the other lines, a last one without a newline not counted: a kill leaves that
    """

    records: list[Record]
    damaged: int

    def with_numbers(self, *keys: str) -> list[Record]:
        """The records that have a number under each of these keys."""
        return [record for record in self.records if all(is_number(record.get(key)) for key in keys)]


def read_metrics(path: Path) -> Metrics:
    """The good lines of a metrics.jsonl.

    Raises:
        DataError: it cannot be read, or is no file.
    """
    records, damaged = [], 0
    try:
        with open(path, "rb") as file:
            for pieces in _lines(file):
                record = parse(pieces)
                if record is not None:
                    records.append(record)
                elif pieces[-1].endswith(b"\n"):
                    damaged += 1
    except OSError as error:
        raise DataError(f"{path}: expected the metrics of a run: {error.strerror}") from None
    return Metrics(records, damaged)


def last_step(path: Path) -> int | None:
    """The largest step of a metrics.jsonl; None where no good line can be read, or where it is no file."""
    largest = None
    try:
        if not path.is_file():  # a pipe would be read for ever
            return None
        with open(path, "rb") as file:
            for pieces in _lines(file):
                if (record := parse(pieces)) is not None:
                    largest = max(largest or 0, record["step"])
    except OSError:
        pass
    return largest


def keep_steps(path: Path, last: int) -> str | None:
    """Drops the lines of steps that a resumed run will take again; good lines up to `last` are kept byte for byte.

    Damaged lines go to metrics.damaged.jsonl beside it, as they are (of one that is longer than LONGEST_LINE, the first
    and the last so many bytes); a last line that a kill cut short goes without a word. The file is replaced as a whole,
    and left alone where nothing is to be dropped.

    Args:
        last: the step that the run goes on from.

    Returns:
        a line about damage, if there is any.

    Raises:
        OSError: it cannot be read or replaced; nothing of it is lost.
    """
    partial, aside = path.with_name(f".{path.name}.partial"), path.with_name(DAMAGED)
    damaged, changed = 0, False
    if not path.is_file():  # a pipe would be read for ever; whoever appends says what is wrong
        return None
    try:
        with open(path, "rb") as source, open(partial, "wb") as kept:
            for pieces in _lines(source):
                record = parse(pieces)
                if record is not None and record["step"] <= last:
                    kept.write(pieces[0])
                    continue
                changed = True
                if record is None and pieces[-1].endswith(b"\n"):
                    damaged += 1
                    _append(aside, pieces)
            kept.flush()
            os.fsync(kept.fileno())
        if changed:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return f"{path}: damaged lines taken out and kept in {DAMAGED}: {damaged:,}" if damaged else None


def parse(pieces: Sequence[bytes]) -> Record | None:
    """The object on a line; None where the line is not good.

    Args:
        pieces: of the line, each of at most LONGEST_LINE bytes
    """
    if len(pieces) > 1 or not pieces[0].endswith(b"\n"):
        return None
    try:
        found = json.loads(pieces[0])
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int or found["step"] < 1:
        return None
    return found


def _lines(file: BinaryIO) -> Iterator[list[bytes]]:
    """Each line as its pieces, one where it is no longer than LONGEST_LINE; of a longer one, the first and the last."""
    while piece := file.readline(LONGEST_LINE):
        pieces = [piece]
        while not piece.endswith(b"\n") and (piece := file.readline(LONGEST_LINE)):
            pieces[1:] = [piece]
        yield pieces


def _append(path: Path, pieces: Sequence[bytes]) -> None:
    with open(path, "ab") as file:
        file.writelines(pieces)


def is_number(value: object) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
