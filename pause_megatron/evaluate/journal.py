"""Samples files: per-record outcomes on disk, batch by batch, so that a killed evaluation resumes after the last batch.

NAME.json holds the identity of the evaluation. NAME.jsonl holds the outcomes, one JSON object a line, in an order that
is fixed before the first batch. A batch is written and synced as a whole, and its last line carries the batch's cost.
Lines after the last such line belong to an unfinished batch; they are truncated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.evaluate.identity import digest, refuse_mismatch
from pause_megatron.evaluate.stored import BatchCost, Sample
from pause_megatron.files.durable import sync_folder, write_whole
from pause_megatron.files.typed_json import parse_object, read_object


class Journal:
    """The outcomes of one task under one setting.

    Args:
        path: NAME.jsonl.
        identity: What the outcomes depend on, plain JSON. It must equal NAME.json, if that exists.
        order: Id of every record, in the order in which they will be appended.

    Attributes:
        samples: The outcomes of complete batches, a prefix of `order`.

    Raises:
        DataError: Outcomes of another model, other data or other settings; or a damaged line.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], order: Sequence[str]) -> None:
        self.path = path
        self.order = order
        self._digest = digest(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        identity_file = path.with_suffix(".json")
        if identity_file.exists():
            refuse_mismatch(identity_file, identity, read_object(identity_file))
        elif path.exists():
            raise DataError(f"{path}: expected {identity_file.name} beside it, which holds its identity; remove {path}")
        else:
            write_whole(identity_file, dump_identity(identity))
        self.samples, length = self._read()
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        self._file.truncate(length)
        sync_folder(path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, samples: Sequence[Sample], cost: BatchCost) -> None:
        """Write a batch and sync it to disk.

        Args:
            samples: Outcomes of the next records of `order`.
            cost: Cost of the batch.
        """
        lines = [sample.model_copy(update={"of": self._digest}) for sample in samples]
        lines[-1] = lines[-1].model_copy(update={"batch": cost})
        self._file.write(dump_samples(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.samples += lines

    def _read(self) -> tuple[list[Sample], int]:
        """Return the outcomes of complete batches, and the number of bytes that hold them."""
        content = self.path.read_bytes() if self.path.exists() else b""
        samples: list[Sample] = []
        kept = kept_bytes = start = 0
        while (end := content.find(b"\n", start)) >= 0:
            samples.append(self._check(content[start:end], len(samples)))
            start = end + 1
            if samples[-1].batch is not None:
                kept, kept_bytes = len(samples), start
        return samples[:kept], kept_bytes

    def _check(self, line: bytes, index: int) -> Sample:
        where = f"{self.path}: line {index + 1}"
        sample = Sample.parse(parse_object(line, where), where)
        if sample.of != self._digest:
            raise DataError(f"{where}: of: expected {self._digest} (see {self.path.stem}.json), got {sample.of!r}")
        expected = self.order[index] if index < len(self.order) else "no further record"
        if sample.id != expected:
            raise DataError(f"{where}: id: expected {expected!r}, got {sample.id!r}")
        return sample


def dump_identity(identity: Mapping[str, Any]) -> bytes:
    """Return the content of an identity file, samples/NAME.json."""
    return json.dumps(identity, indent=2, ensure_ascii=False).encode() + b"\n"


def dump_samples(samples: Sequence[Sample]) -> bytes:
    """Return lines of a samples file."""
    return "".join(json.dumps(sample.as_json(), ensure_ascii=False) + "\n" for sample in samples).encode()


def read_samples(path: str | Path) -> dict[str, Sample]:
    """Return the outcomes in a samples file (NAME.jsonl) by record id, whether or not the evaluation is complete.

    `paired_bootstrap` takes `{id: sample.scores[metric] for id, sample in read_samples(path).items()}`.

    Raises:
        DataError: The file cannot be read, or a line is damaged.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    found = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        sample = Sample.parse(parse_object(line, where), where)
        found[sample.id] = sample
    return found
