"""Loader of tasks by name: a task that ships, a YAML file, or an object named as 'module:attribute'."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import BaseModel, ValidationError

from pause_megatron.config.spelling import nearest
from pause_megatron.config.text import Entry, read_entries
from pause_megatron.config.user_code import import_attribute
from pause_megatron.errors import ConfigError
from pause_megatron.tasks.metrics.registry import find_metric
from pause_megatron.tasks.task import TASK_MEMBERS, Decoding, FinetuneDefaults, Kind, Task
from pause_megatron.tasks.yaml_task import DeclaredTask

FOLDER = Path(__file__).resolve().parent


def task_names() -> tuple[str, ...]:
    """Return the names of the tasks that ship."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def load_task(name: str) -> Task:
    """Return the task of a name.

    Args:
        name: One of `task_names()`, a path that ends in .yaml, or 'module:attribute' for an object shaped like `Task`.

    Raises:
        ConfigError: No task has that name, or the file or object is no task. Names file, line and key.
    """
    names = task_names()
    if name in names:
        return _read_yaml(FOLDER / f"{name}.yaml")
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    if ":" in name:
        return _import(name)
    raise ConfigError(
        f"task.name: expected one of {', '.join(names)}, a .yaml file, or 'module:attribute', got {name!r}"
        f"{nearest(name, names)}"
    )


def _read_yaml(path: Path) -> DeclaredTask:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text ({error})") from None
    except OSError as error:
        raise ConfigError(f"task.name: {path} cannot be read: {error.strerror}") from None
    entries = {entry.path: entry for entry in read_entries(text, str(path))}
    if "name" in entries:
        raise ConfigError(
            f"{entries['name'].where}: expected no key 'name', which the file's name gives ({path.stem}); remove it"
        )
    nested: dict[str, Any] = {"name": path.stem, "folder": path.stem}
    for key, entry in entries.items():
        section, _, inner = key.partition(".")
        value = tuple(entry.value) if isinstance(entry.value, list) else entry.value
        if inner:
            nested.setdefault(section, {})[inner] = value
        else:
            nested[section] = value
    try:
        return DeclaredTask.model_validate(nested, context={"folders": (path.parent, Path.cwd())})
    except ValidationError as error:
        problems = [_problem(path, entries, dict(problem)) for problem in error.errors()]
    raise ConfigError("\n".join(problems))


def _problem(path: Path, entries: dict[str, Entry], problem: dict[str, Any]) -> str:
    """Return the message about one key of a task's file."""
    parts = [part for part in problem["loc"] if isinstance(part, str)]
    key = ".".join(parts)
    where = entries[key].where if key in entries else str(path)
    if problem["type"] == "extra_forbidden":
        known = _keys(parts[:-1])
        return f"{where}: unknown key {key!r}{nearest(parts[-1], known) or '. Keys: ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{path}: expected the key {key!r}, got none"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {key}: {message}" if key else f"{path}: {message}"
    return f"{where}: {key}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}"


def _keys(parents: list[str]) -> list[str]:
    section: type[BaseModel] = DeclaredTask
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), section)
    return [field.alias or name for name, field in section.model_fields.items() if name != "name"]


def _import(name: str) -> Task:
    try:
        found = import_attribute(name)
    except ConfigError as error:
        raise ConfigError(
            f"task.name: {name!r} cannot be imported: {error}; its module must be in this folder or on PYTHONPATH"
        ) from None
    if isinstance(found, type) or not isinstance(found, Task):
        absent = [member for member in TASK_MEMBERS if not hasattr(found, member)]
        what = "is a class; name an instance" if isinstance(found, type) else f"lacks {', '.join(absent)}"
        raise ConfigError(f"task.name: expected {name!r} to have {', '.join(TASK_MEMBERS)}; it {what}")
    _check_members(found, name)
    return found


def _check_members(task: Task, name: str) -> None:
    """Check what a user's object gives."""

    def refuse(member: str, expected: str) -> NoReturn:
        raise ConfigError(f"task {name}: {member}: expected {expected}, got {getattr(task, member)!r}")

    if task.kind not in get_args(Kind):
        refuse("kind", "'generate' or 'choice'")
    if not isinstance(task.metrics, (tuple, list)) or not task.metrics:
        refuse("metrics", "a tuple of names")
    for member, kind in (("decoding", Decoding), ("finetune", FinetuneDefaults)):
        if not isinstance(getattr(task, member), kind):
            refuse(member, f"an instance of {kind.__name__}")
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    folders = (*((Path(file).parent,) if file else ()), Path.cwd())
    try:
        reads = {metric: find_metric(metric, folders).reads for metric in task.metrics}
    except ConfigError as error:
        raise ConfigError(f"task {name}: metrics: {error}") from None
    if task.primary not in task.metrics:
        refuse("primary", f"one of metrics ({', '.join(map(str, task.metrics))})")
    if reads[task.primary] != ("choices" if task.kind == "choice" else "text"):
        refuse("primary", f"a metric that scores kind {task.kind}")
