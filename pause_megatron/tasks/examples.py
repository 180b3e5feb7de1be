"""Examples of any task, checked; and the fingerprint that tells one set of examples from another."""

from __future__ import annotations

import json
from collections.abc import Iterable

import xxhash

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks.task import Example, Split, Task


def read_examples(task: Task, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
    """Examples of a task, in the order of the data set.

    Args:
        split: "train" or "eval"; the task knows what its data set calls them.
        path: folder of this one task's records as JSON lines, plain or .gz; None: the Hugging Face hub.
        limit: the first so many examples; None: all. (A CoQA story is several examples.)

    Raises:
        DataError: the split or a field is not there, a record is not as declared (file, line, field, expected, came).
        ConfigError: the task has no such split, or `limit` is below 1.
    """
    if split not in ("train", "eval"):
        raise ConfigError(f"split: expected train or eval; came {split!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"task.limit: expected at least 1; came {limit}")
    examples = task.examples(split, path, limit)
    if not examples:
        raise DataError(f"task {task.name}: expected at least one example in its {split} split; there is none")
    for example in examples:
        _check(task, example)
    return examples


def fingerprint(examples: Iterable[Example]) -> str:
    """Digest of all that a model is asked and judged by, as 'xxh3_128:HEX'."""
    hasher = xxhash.xxh3_128()
    for example in examples:
        hasher.update(json.dumps(vars(example), sort_keys=True).encode() + b"\n")
    return f"xxh3_128:{hasher.hexdigest()}"


def _check(task: Task, example: Example) -> None:
    """What every later stage relies on, also for tasks that people plug in."""
    problem = None
    if not example.prompt or example.prompt != example.prompt.rstrip():
        problem = f"a prompt that is not empty and does not end in white space; came {example.prompt[-40:]!r}"
    elif not example.target.strip():
        problem = f"a target that is not empty; came {example.target!r}"
    elif not example.references:
        problem = "at least one reference; came none"
    elif bool(example.choices) != (example.gold is not None):
        problem = f"choices and gold, or neither; came {len(example.choices)} choices and gold {example.gold}"
    elif example.choices and not 0 <= example.gold < len(example.choices):
        problem = f"gold in 0..{len(example.choices) - 1}; came {example.gold}"
    elif task.kind == "choice" and not example.choices:
        problem = "choices, because the task scores options; came none"
    if problem:
        raise DataError(f"task {task.name}, example {example.id}: expected {problem}")
