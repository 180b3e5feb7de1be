"""Reading and checking the examples of a task, and the fingerprint of a set of examples."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.digest import Hasher
from pause_megatron.tasks.task import Example, Split, Task


def read_examples(task: Task, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
    """Return the examples of a split in the order of the dataset.

    Args:
        task: The task.
        split: "train" or "eval"; the task maps it to its dataset's name of the split.
        path: Folder with the records of this task as JSON lines; None reads the Hugging Face Hub.
        limit: Number of examples to read from the start; None reads all. (A CoQA story gives several examples.)

    Raises:
        DataError: The split or a field is missing, or a record is not as declared. Names file, line and field.
        ConfigError: The task has no such split, or `limit` is below 1.
    """
    if split not in ("train", "eval"):
        raise ConfigError(f"split: expected train or eval, got {split!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"task.limit: expected at least 1, got {limit}")
    examples = task.examples(split, path, limit)
    if not examples:
        raise DataError(f"task {task.name}: expected at least one example in its {split} split, got none")
    for example in examples:
        _check(task, example)
    return examples


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the digest of all that a model reads or is scored by, as 'xxh3_128:HEX'.

    `group` is left out, because no answer depends on it; `hints` where there are none, as before they existed.
    """
    hasher = Hasher()
    for example in examples:
        fields = {name: value for name, value in vars(example).items() if name != "group"}
        if not example.hints:
            del fields["hints"]
        hasher.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return hasher.digest


def _check(task: Task, example: Example) -> None:
    """Check the invariants that tokenization and scoring rely on; tasks from outside are not trusted."""
    problem = None
    if not example.prompt or example.prompt != example.prompt.rstrip():
        problem = f"a prompt that is not empty and does not end in white space, got {example.prompt[-40:]!r}"
    elif not example.target.strip():
        problem = f"a target that is not empty, got {example.target!r}"
    elif not example.references:
        problem = "at least one reference, got none"
    elif bool(example.choices) != (example.gold is not None):
        problem = f"choices and gold, or neither, got {len(example.choices)} choices and gold {example.gold}"
    elif example.gold is not None and not 0 <= example.gold < len(example.choices):
        problem = f"gold in 0..{len(example.choices) - 1}, got {example.gold}"
    elif task.kind == "choice" and not example.choices:
        problem = "choices, because the task scores options, got none"
    if problem:
        raise DataError(f"task {task.name}, example {example.id}: expected {problem}")
