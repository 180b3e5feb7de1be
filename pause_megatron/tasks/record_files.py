"""Reading the records of a declared task from a folder of JSON lines or from the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from pause_megatron.config.section import Section
from pause_megatron.data.text.shard_file import DamagedShard, ShardFile
from pause_megatron.errors import DataError
from pause_megatron.tasks.records import Record
from pause_megatron.tasks.task import Split

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class Dataset(Section):
    """A dataset on the Hugging Face Hub. A local folder holds the same records as JSON lines."""

    path: str = Field(min_length=1, description="dataset on the Hub, OWNER/NAME")
    config: str | None = Field(None, description="its configuration, where it has several")
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest")


def find_file(task: str, split: Split, names: Sequence[str], folder: Path) -> Path:
    """Return the first file of `names` that exists as .jsonl, .jsonl.gz or .jsonl.zst.

    Args:
        task: Name of the task, for messages.
        split: The split, for messages.
        names: File names without their ending, the preferred one first.
        folder: Folder of the task's records.

    Raises:
        DataError: No such file exists. Names the files that do.
    """
    if not folder.is_dir():
        raise DataError(f"task.path: expected a folder with the records of {task}, got {folder}")
    candidates = [f"{stem}{ending}" for stem in dict.fromkeys(names) for ending in _ENDINGS]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    present = sorted(file.name for file in folder.iterdir() if file.name.endswith(_ENDINGS))
    raise DataError(
        f"task.path: {folder} has no {split} split of {task}: expected {' or '.join(candidates)}, got "
        f"{', '.join(present) or 'no JSON-lines files'}"
    )


def file_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON-lines file in their order; blank lines are skipped.

    Raises:
        DataError: A line is no JSON object, the file is damaged, or it has no record.
    """
    file = ShardFile(path)
    found = False
    try:
        for number, line in enumerate(file.lines(), start=1):
            if line is None or line.strip():
                yield _parse(line, f"{path}:{number}", first=number == 1)
                found = True
    except DamagedShard as error:
        raise DataError(f"{path}: {error.reason}, after line {file.line:,}; fetch the file again") from None
    if not found:
        raise DataError(f"{path}: expected a JSON object per line, got an empty file")


def hub_records(data: Dataset, split: str, hint: str) -> Iterator[Record]:
    """Yield the records of a dataset on the Hugging Face Hub, or in its local cache.

    Args:
        data: The dataset.
        split: The dataset's name of the split.
        hint: End of the error message: what to do without network.

    Raises:
        DataError: The dataset cannot be read.
    """
    from datasets import load_dataset

    try:
        table = load_dataset(data.path, data.config, split=split, revision=data.revision)
    except Exception as error:  # loaders raise whatever their format's or the network's library raises
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"the dataset {data.path} (split {split}) cannot be read from the Hugging Face Hub "
            f"({type(error).__name__}: {lines[0]}). {hint}"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Record(values, f"{data.path}[{split}] record {number}")


def _parse(line: bytes | None, where: str, first: bool) -> Record:
    if line is None:
        raise DataError(f"{where}: expected a JSON object, got a line that is too long for a record")
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: expected a JSON object, got {line[:40]!r} ({problem})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {line[:40]!r}")
    return Record(value, where)
