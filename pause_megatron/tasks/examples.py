"""Reading and checking the examples of a task, and the fingerprint of a set of examples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal, get_args

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.digest import Hasher
from pause_megatron.tasks.sampling import divide, sample
from pause_megatron.tasks.task import Example, Split, Task
from pause_megatron.tasks.yaml_task import DeclaredTask

Part = Literal["train", "held-out", "eval"]
"""A split, or the part of the train split that is held out from finetuning."""


def read_examples(
    task: Task,
    part: Part,
    path: str | None = None,
    limit: int | None = None,
    held_out: float | None = None,
    *,
    from_start: bool = False,
) -> list[Example]:
    """Return the examples of a split, or of a part of it, in the order of the dataset.

    Args:
        task: The task.
        part: "train", "eval", or "held-out" of the train split. The task maps splits to its dataset's names.
        path: Folder with the records of this task as JSON lines; None reads the Hugging Face Hub.
        limit: Number of examples; None for all. They are a `sample` of all examples. A task that generates its examples
            (without `ordered`) gives the first ones.
        held_out: Fraction of the train split that is held out, by group; None or 0: none.
        from_start: Take the first `limit` examples, as earlier versions did.

    Raises:
        DataError: The split or a field is missing, or a record is not as declared. Names file, line and field.
        ConfigError: The task has no such split, there is nothing to hold out, or `limit` is below 1.
    """
    if part not in get_args(Part):
        raise ConfigError(f"split: expected {', '.join(get_args(Part))}, got {part!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"task.limit: expected at least 1, got {limit}")
    if part == "eval" or not held_out:
        if part == "held-out":
            raise ConfigError(f"task.held_out: expected a fraction above 0, got {held_out!r}: nothing is held out")
        draws = getattr(task, "ordered", False) and not from_start
        examples = sample(_all(task, part, path, None if draws else limit), limit)
    else:
        kept, held = divide(_all(task, "train", path, None), held_out)
        if isinstance(task, DeclaredTask) and task.few_shot:
            unseen = {example.id for example in held}
            shot = {example.id: example for example in task.examples("train", path, unseen=unseen)}
            kept, held = ([shot[example.id] for example in examples] for examples in (kept, held))
        if part == "train" and limit is not None and limit > len(kept) + len(held):
            ids = {example.id for example in held}  # a task that generates as many as are asked for
            kept = [example for example in _all(task, "train", path, limit) if example.id not in ids]
        examples = sample(held if part == "held-out" else kept, limit)
    return examples


def _all(task: Task, split: Split, path: str | None, limit: int | None) -> list[Example]:
    """Return checked examples as the task gives them."""
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
    elif not isinstance(example.group, str):
        problem = f"a group that is a text, got {example.group!r}"
    elif not example.references:
        problem = "at least one reference, got none"
    elif bool(example.choices) != (example.gold is not None):
        problem = f"choices and gold, or neither, got {len(example.choices)} choices and gold {example.gold}"
    elif example.gold is not None and not 0 <= example.gold < len(example.choices):
        problem = f"gold in 0..{len(example.choices) - 1}, got {example.gold}"
    elif not all(choice.strip() for choice in example.choices):
        problem = f"choices that are not blank, got {example.choices!r}"
    elif task.kind == "choice" and not example.choices:
        problem = "choices, because the task scores options, got none"
    if problem:
        raise DataError(f"task {task.name}, example {example.id}: expected {problem}")
