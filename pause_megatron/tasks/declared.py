"""From the records of a declared task to its examples: files or the Hugging Face hub, transform, templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pause_megatron.data.shard_file import DamagedShard, ShardFile
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks.records import TRANSFORMS, Record
from pause_megatron.tasks.task import DeclaredTask, Example, Split
from pause_megatron.tasks.template import ANSWER, names_in, render

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def declared_examples(task: DeclaredTask, split: Split, path: str | None, limit: int | None) -> list[Example]:
    """The first `limit` examples of a split.

    Raises:
        ConfigError: the task has no such split. DataError: nothing there, or a record that is not as declared.
    """
    name = task.splits.train if split == "train" else task.splits.eval
    if name is None:
        raise ConfigError(f"task {task.name}: its data set {task.dataset.path} has no split to finetune on")
    records = _hub_records(task, name) if path is None else _file_records(_find_file(task, split, name, Path(path)))
    return list(islice(_examples(task, records), limit))


def _examples(task: DeclaredTask, records: Iterator[Record]) -> Iterator[Example]:
    transform = TRANSFORMS[task.transform] if task.transform else lambda record: [record]
    for number, record in enumerate(records, start=1):
        for part in transform(record):
            yield _example(task, part, str(number) if part.part is None else f"{number}.{part.part}")


def _example(task: DeclaredTask, record: Record, name: str) -> Example:
    choices: tuple[str, ...] = ()
    gold = None
    if task.choices:
        several = len(task.choices) > 1
        choices = tuple(map(record.text, task.choices)) if several else record.texts(task.choices[0])
        gold = record.index(task.gold, len(choices))
    references = record.texts(task.references) if task.references else (choices[gold],)
    values = {field: _field(task, record, field) for field in names_in(task.prompt)}
    others = {field: _field(task, record, field) for field in names_in(task.target) if field != ANSWER}

    def written(answer: str) -> str:
        return render(task.target, {**others, ANSWER: answer})

    return Example(
        id=name,
        prompt=render(task.prompt, values).rstrip(),
        target=written(references[0] if gold is None else choices[gold]),
        references=references,
        choices=tuple(map(written, choices)),
        gold=gold,
    )


def _field(task: DeclaredTask, record: Record, name: str) -> str:
    """A field for a template: an integer's digits; a text that is not blank, without white space around it."""
    value = record.get(name)
    if type(value) is int:
        return str(value)
    # What a transform made stands as it is, and may be empty (a conversation before its first turn).
    return record.any_text(name) if task.transform else record.text(name)


def _find_file(task: DeclaredTask, split: Split, name: str, folder: Path) -> Path:
    names = (name, "train") if split == "train" else (name,)
    if not folder.is_dir():
        raise DataError(f"task.path: expected a folder with the records of {task.name}; {folder} is none")
    candidates = [f"{stem}{ending}" for stem in dict.fromkeys(names) for ending in _ENDINGS]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    there = sorted(file.name for file in folder.iterdir() if file.name.endswith(_ENDINGS))
    raise DataError(
        f"task.path: {folder} has no {split} split of {task.name}: expected {' or '.join(candidates)}; there "
        f"{'is ' + ', '.join(there) if there else 'are no JSON-lines files'}"
    )


def _file_records(path: Path) -> Iterator[Record]:
    file = ShardFile(path)
    found = False
    try:
        for number, line in enumerate(file.lines(), start=1):
            if line is None or line.strip():
                yield _parsed(line, f"{path}:{number}", first=number == 1)
                found = True
    except DamagedShard as error:
        raise DataError(f"{path}: {error.reason}, after line {file.line:,}; fetch the file again") from None
    if not found:
        raise DataError(f"{path}: expected a JSON object per line; the file is empty")


def _parsed(line: bytes | None, where: str, first: bool) -> Record:
    if line is None:
        raise DataError(f"{where}: expected a JSON object; came a line that is too long to be a record")
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: expected a JSON object; came {line[:40]!r} ({problem})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object; came {line[:40]!r}")
    return Record(value, where)


def _hub_records(task: DeclaredTask, split: str) -> Iterator[Record]:
    source = task.dataset
    try:
        from datasets import load_dataset

        table = load_dataset(source.path, source.config, split=split, revision=source.revision)
    except Exception as error:  # loaders raise whatever their format's or network's library raises
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"task {task.name}: the data set {source.path} (split {split}) cannot be read from the Hugging Face hub "
            f"({type(error).__name__}: {lines[0]}). Without network, give a folder with its records as JSON lines "
            f"({split}.jsonl or {split}.jsonl.gz): task.path=DIR, or --task-path ROOT with ROOT/{task.folder}/"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Record(values, f"{source.path}[{split}] record {number}")
