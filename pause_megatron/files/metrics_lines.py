"""Reading metrics.jsonl after crashes, full disks and edits, and truncating it on resume.

A valid line is a JSON object of at most `LONGEST_LINE` bytes, ended by a newline, with a positive integer `step`.
Readers skip all other lines; a resume moves them to a file of their own.
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
"""In bytes. The line of a step has some hundreds, and about fifty more for each corpus of a blend."""

StepRecord = dict[str, Any]
"""The JSON object of a step."""


@dataclass(frozen=True)
class Metrics:
    """Content of a metrics.jsonl.

    Attributes:
        records: The valid lines, in the file's order.
        damaged: Number of the other lines, without an incomplete last line, which a kill leaves.
    """

    records: list[StepRecord]
    damaged: int

    def with_numbers(self, *keys: str) -> list[StepRecord]:
        """Return the records that have a number under each of these keys."""
        return [record for record in self.records if all(is_number(record.get(key)) for key in keys)]


def read_metrics(path: Path) -> Metrics:
    """Read the valid lines of a metrics.jsonl.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be read, or is not a file.
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
    """Return the largest step of a metrics.jsonl; None where it has no valid line, or is not a file."""
    largest = None
    try:
        if not path.is_file():  # reading a pipe would block
            return None
        with open(path, "rb") as file:
            for pieces in _lines(file):
                if (record := parse(pieces)) is not None:
                    largest = max(largest or 0, record["step"])
    except OSError:
        pass
    return largest


def keep_steps(path: Path, last: int) -> str | None:
    """Drop the lines of steps that a resumed run repeats; valid lines up to `last` are kept byte for byte.

    Damaged lines are moved to metrics.damaged.jsonl (of a line longer than LONGEST_LINE, the first and the last
    LONGEST_LINE bytes). An incomplete last line, which a kill leaves, is dropped. The file is replaced atomically, and
    not written where nothing is dropped.

    Args:
        path: The file.
        last: The step that the run resumes from.

    Returns:
        A line about damage, or None.

    Raises:
        OSError: It cannot be read or replaced; nothing is lost.
    """
    partial, aside = path.with_name(f".{path.name}.partial"), path.with_name(DAMAGED)
    damaged, changed = 0, False
    if not path.is_file():  # reading a pipe would block; appending reports what is wrong
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


def parse(pieces: Sequence[bytes]) -> StepRecord | None:
    """Parse a line; None where it is not valid.

    Args:
        pieces: Pieces of the line, each of at most LONGEST_LINE bytes.
    """
    if len(pieces) > 1 or not pieces[0].endswith(b"\n"):
        return None
    try:
        record = json.loads(pieces[0])
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 1:
        return None
    return record


def _lines(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield each line as pieces: one where it is at most LONGEST_LINE long, else the first and the last."""
    while piece := file.readline(LONGEST_LINE):
        pieces = [piece]
        while not piece.endswith(b"\n") and (piece := file.readline(LONGEST_LINE)):
            pieces[1:] = [piece]
        yield pieces


def _append(path: Path, pieces: Sequence[bytes]) -> None:
    with open(path, "ab") as file:
        file.writelines(pieces)


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
