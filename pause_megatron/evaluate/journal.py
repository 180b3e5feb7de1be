"""Per-record outcomes on disk, batch by batch, so that a killed evaluation goes on where it was.

NAME.json says what the records were computed with (the identity); NAME.jsonl holds them, one JSON object a line, in an
order that is fixed before the first batch. A batch is written and synced as a whole, and its last line carries the
batch's cost: lines behind the last such line are of a batch that was in flight, and are cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from pause_megatron.errors import DataError
from pause_megatron.files.durable import sync_folder, write_whole

Record = dict[str, Any]


class Journal:
    """The outcomes of one task under one setting.

    Args:
        path: NAME.jsonl.
        identity: what the outcomes depend on; plain JSON. It must be what NAME.json says, if that is there.
        order: id of every record, in the order in which they will be appended.

    Attributes:
        records: those that are complete, a prefix of `order`.

    Raises:
        DataError: outcomes of another model, other data or other settings; or a damaged line.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], order: Sequence[str]) -> None:
        self.path = path
        self.order = order
        self._of = digest(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".json")
        if beside.exists():
            refuse_others(beside, identity, read_object(beside))
        elif path.exists():
            raise DataError(f"{path}: expected {beside.name} beside it, which says what it is of; remove it")
        else:
            write_whole(beside, json.dumps(identity, indent=2, ensure_ascii=False).encode() + b"\n")
        self.records, length = self._read()
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        self._file.truncate(length)
        sync_folder(path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, records: Sequence[Record], cost: Mapping[str, Any]) -> None:
        """Write a batch; it is on the disk when this returns.

        Args:
            records: the next ones of the order.
            cost: what the batch cost.
        """
        lines = [{**record, "of": self._of} for record in records]
        lines[-1]["batch"] = {"records": len(lines), **cost}
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records += lines

    def _read(self) -> tuple[list[Record], int]:
        """Complete records, and the bytes that hold them."""
        content = self.path.read_bytes() if self.path.exists() else b""
        records: list[Record] = []
        kept = kept_bytes = at = 0
        while (end := content.find(b"\n", at)) >= 0:
            records.append(self._check(content[at:end], len(records)))
            at = end + 1
            if "batch" in records[-1]:
                kept, kept_bytes = len(records), at
        return records[:kept], kept_bytes

    def _check(self, line: bytes, index: int) -> Record:
        where = f"{self.path}: line {index + 1}"
        record = parse_object(line, where)
        if record.get("of") != self._of:
            raise DataError(f"{where}: of: expected {self._of} (see {self.path.stem}.json), got {record.get('of')!r}")
        expected = self.order[index] if index < len(self.order) else "no further record"
        if record.get("id") != expected:
            raise DataError(f"{where}: id: expected {expected!r}, got {record.get('id')!r}")
        if not isinstance(record.get("scores"), dict):
            raise DataError(f"{where}: scores: expected an object, got {record.get('scores')!r}")
        return record


def digest(identity: Mapping[str, Any]) -> str:
    """What every line of a journal names: 32 hex digits of the identity."""
    return xxhash.xxh3_128(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_others(path: Path, expected: Mapping[str, Any], came: Mapping[str, Any], at: str = "") -> None:
    """Check that a file is of this run.

    Raises:
        DataError: it names the field that differs, what this run has, and what the file has.
    """
    for name in [*expected, *(set(came) - set(expected))]:
        one, other = expected.get(name), came.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            refuse_others(path, one, other, f"{at}{name}.")
        elif one != other:
            raise DataError(
                f"{path}: {at}{name}: expected {one!r} (this run), got {other!r}: results of another model, other "
                f"data or other settings; give another --output, or remove them"
            )


def read_object(path: Path) -> Record:
    """A JSON file that holds one object.

    Raises:
        DataError: it does not, or cannot be read.
    """
    try:
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def parse_object(content: bytes, where: str) -> Record:
    """One JSON object.

    Raises:
        DataError: it is something else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: damaged: expected a JSON object, got {content[:60]!r} ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: damaged: expected a JSON object, got {content[:60]!r}")
    return found


def read_samples(path: str | Path) -> dict[str, Record]:
    """Records of a samples file (NAME.jsonl), by id, whether or not the evaluation has ended.

    `paired_bootstrap` takes `{id: record["scores"][metric] for id, record in read_samples(path).items()}`.

    Raises:
        DataError: it cannot be read, or a line of it is damaged.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    found = {}
    for number, line in enumerate(lines, 1):
        record = parse_object(line, f"{path}: line {number}")
        if not isinstance(record.get("id"), str):
            raise DataError(f"{path}: line {number}: id: expected a text, got {record.get('id')!r}")
        found[record["id"]] = record
    return found
