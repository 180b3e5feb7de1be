"""Loader of grids from a file and `path=value` overrides, with errors that name the line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pause_megatron.config.spelling import nearest
from pause_megatron.config.text import read_override, read_tree, write_yaml
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.renamed import with_new_keys
from pause_megatron.experiment.schema import Grid

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "experiments"
_COMMAND_LINE = "command line"

Locations = dict[tuple[str, ...], str]
"""FILE:LINE of each key by its path."""


def recipe_names() -> tuple[str, ...]:
    """Return the names of the experiments that ship."""
    return tuple(sorted(file.stem for file in RECIPES.glob("*.yaml")))


def load_grid(path: str | Path | None = None, *, recipe: str | None = None, overrides: Iterable[str] = ()) -> Grid:
    """Load a grid from a file or a recipe, exactly one of them.

    Args:
        path: A grid file.
        recipe: A name of `recipe_names`.
        overrides: `data.prefix=...`, `tasks.gsm8k.limit=100`, `finetune.set.train.steps=50`, ...

    Raises:
        ConfigError: The file or recipe does not exist or is not YAML, a key is unknown, a value does not fit, or a name
            is used but not defined. Names file and line.
    """
    file = grid_path(path, recipe)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {file} cannot be read: {error}") from None
    tree, locations = read_tree(text, str(file))
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}:1: expected groups of keys ('models:', 'variants:'), got {tree!r}")
    locations[()] = str(file)
    _spell_out_tasks(tree, locations, file)
    for override in overrides:
        _put(tree, locations, override)
    _spell_out_tasks(tree, locations, file)
    with_new_keys(tree, locations)
    for rows in ("models", "variants"):  # null leaves a row out
        if isinstance(tree.get(rows), Mapping):
            tree[rows] = {name: row for name, row in tree[rows].items() if row is not None}
    try:
        grid = Grid.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(dict.fromkeys(_message(problem, locations) for problem in error.errors()))
        ) from None
    _check_names(grid, locations)
    return grid


def dump_grid(grid: Grid) -> str:
    """Return the grid as YAML; `load_grid` of it returns the same grid."""
    return write_yaml(grid.model_dump(mode="json"))


def grid_path(path: str | Path | None, recipe: str | None) -> Path:
    """Return the file of a grid, exactly one of both.

    Args:
        path: A grid file.
        recipe: A name of `recipe_names`.

    Raises:
        ConfigError: Both or neither are given, or no recipe has that name.
    """
    if path is not None and recipe is None:
        return Path(path)
    if recipe is None or path is not None:
        got = "neither" if path is None else "both"
        raise ConfigError(f"expected an experiment: --recipe NAME or --config FILE, one of them, got {got}")
    names = recipe_names()
    if recipe not in names:
        raise ConfigError(f"--recipe: expected one of {', '.join(names)}, got {recipe!r}{nearest(recipe, names)}")
    return RECIPES / f"{recipe}.yaml"


def _spell_out_tasks(tree: dict[str, Any], locations: Locations, file: Path) -> None:
    """Write out the short forms of `tasks`: a list of tasks, and a file or module:attribute in place of a name.

    Args:
        tree: The grid; its `tasks` become {name: {task: ..., ...}}.
        locations: FILE:LINE of each key; the places of renamed keys are added.
        file: The grid's file; task files are relative to its folder.

    Raises:
        ConfigError: A task file does not exist, two tasks have one name, or an item of the list is no task.
    """
    given = tree.get("tasks")
    given = (given,) if isinstance(given, str) else given
    if isinstance(given, Mapping):
        written = [(key, key, section) for key, section in given.items()]
    elif isinstance(given, (tuple, list)):
        written = [(str(index), task, None) for index, task in enumerate(given)]
    else:
        return
    spelled: dict[str, Any] = {}
    for key, task, section in written:
        where = _at(locations, "tasks", key)
        if not isinstance(task, str):
            raise ConfigError(
                f"{where}: tasks: expected the name or file of a task in the list, got {task!r}; for a task with keys "
                f"of its own write a group instead of the list: tasks: {{gsm8k: {{}}, quiz.yaml: {{pauses: [3]}}}}"
            )
        name, keys = _named(task, where, file)
        if name in spelled:
            raise ConfigError(
                f"{where}: tasks: expected one task named {name}, got two; write OTHER_NAME: {{task: {task}}}"
            )
        spelled[name] = {**keys, **section} if isinstance(section, Mapping) else keys if section is None else section
        for path in [path for path in locations if path[:2] == ("tasks", key)]:
            locations[("tasks", name, *path[2:])] = locations[path]
    tree["tasks"] = spelled


def _named(task: str, where: str, file: Path) -> tuple[str, dict[str, str]]:
    """Return the name that a task has in the grid, and its keys: {} for a name, {task: ...} for a file or an object."""
    if task.endswith((".yaml", ".yml")):
        path = file.parent / task
        if not path.is_file():
            raise ConfigError(
                f"{where}: tasks: expected the task file {task} in the grid's folder ({file.parent}), got none; "
                f"write its path from there, or NAME: {{task: PATH}} with a path from the working folder"
            )
        return _name_of(task), {"task": str(path)}
    if ":" in task:
        return task.rpartition(":")[2].rpartition(".")[2].strip("_"), {"task": task}
    return task, {}


def _name_of(file: str) -> str:
    """Return the name of a task file in a grid: my-quiz.yaml is my_quiz."""
    return re.sub(r"[^A-Za-z0-9]+", "_", Path(file).stem).strip("_")


def _put(tree: dict[str, Any], locations: Locations, override: str) -> None:
    """Set one value; after `.set.`, the rest of the path is one key of a run's configuration."""
    entry = read_override(override)
    head, is_run_key, tail = entry.path.partition(".set.")
    path = (*head.split("."), *(("set", tail) if is_run_key else ()))
    group = tree
    for name in path[:-1]:
        group = group.setdefault(name, {})
        if not isinstance(group, dict):
            raise ConfigError(f"{_COMMAND_LINE}: {entry.path}: {name}: expected a group of keys, got a value")
    group[path[-1]] = tuple(entry.value) if isinstance(entry.value, list) else entry.value
    locations[path] = _COMMAND_LINE


def _message(problem: ErrorDetails, locations: Locations) -> str:
    """Return one error as FILE:LINE: path: expected X, got Y."""
    path = tuple(str(part) for part in problem["loc"])
    while path not in locations and len(path) > 1:  # a missing key, or a union's branch
        path = path[:-1]
    where = _at(locations, *path)
    shown = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _keys_of(path[:-1])
        return f"{where}: unknown key {shown!r}{nearest(path[-1], known) or '. Keys here: ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: {'.'.join(map(str, problem['loc']))}: expected a value, got none"
    if problem["type"] == "string_pattern_mismatch" and "tasks" in problem["loc"]:
        expected = "a name of letters, digits and _, a task file (quiz.yaml) or module:attribute"
        if problem["loc"][-1] != "[key]":
            expected = f"the task's name in this grid ({_name_of(str(problem['input']))})"
        elsewhere = "" if problem["loc"][-1] != "[key]" else "; to name a task yourself write NAME: {task: FILE.yaml}"
        return f"{where}: {shown}: expected {expected}, got {problem['input']!r}{elsewhere}"
    if problem["type"] == "value_error":  # of a section's own validator, which says what it got
        return f"{where}: {shown}: {problem['ctx']['error']}"
    return f"{where}: {shown}: {_plain(problem['msg'])}, got {problem['input']!r}"


def _at(locations: Locations, *path: str) -> str:
    """Return FILE:LINE of a key, or of the nearest group around it; else the file."""
    while path not in locations:
        path = path[:-1]
    return locations[path]


def _plain(text: str) -> str:
    """Return pydantic's message in the words of this package."""
    for old, new in (
        ("Input should be a valid tuple", "expected a list"),
        ("Tuple should have", "expected a list with"),
        (" after validation, not 0", ""),
        ("Input should be", "expected"),
        ("String should match pattern", "expected the form"),
    ):
        text = text.replace(old, new)
    return text


def _keys_of(path: tuple[str, ...]) -> list[str]:
    """Return the keys of the group at a path, from the schema."""
    group: type[BaseModel] | None = Grid
    named = False  # whether the next part is a user's name or a list index
    for part in path:
        if named:
            named = False
        elif group is not None and part in group.model_fields:
            annotation = group.model_fields[part].annotation
            members = [member for member in (annotation, *get_args(annotation)) if isinstance(member, type)]
            group = next((member for member in members if issubclass(member, BaseModel)), None)
            named = get_origin(annotation) in (dict, tuple)
    return list(group.model_fields) if group else []


def _check_names(grid: Grid, locations: Locations) -> None:
    """Check that every used name of a model, variant or task is defined.

    Raises:
        ConfigError: A name is not defined. Suggests the nearest name.
    """
    used: list[tuple[tuple[str, ...], str, Mapping[str, object]]] = [(("baseline",), grid.baseline, grid.variants)]
    for name, model in grid.models.items():
        if model.budget:
            used.append((("models", name, "budget", "like"), model.budget.like, grid.models))
        if (model.recipe is None) == (model.config is None):
            raise ConfigError(
                f"{_at(locations, 'models', name)}: models.{name}: expected recipe or config, one of them"
            )
    for name, variant in grid.variants.items():
        used.append((("variants", name, "model"), variant.model, grid.models))
        used += [(("variants", name, "tasks"), task, grid.tasks) for task in variant.tasks or ()]
        if variant.finetune == "standard" and variant.pauses:
            raise ConfigError(
                f"{_at(locations, 'variants', name)}: variants.{name}.pauses: expected none with finetune: standard "
                f"(for pauses at inference only: inference.pauses), got {variant.pauses}"
            )
    for index, curve in enumerate(grid.curves):
        used += [(("curves", str(index), "variants"), variant, grid.variants) for variant in curve.variants]
        used += [(("curves", str(index), "tasks"), task, grid.tasks) for task in curve.tasks or ()]
    for path, name, known in used:
        if name not in known:
            default = "" if path in locations else ", the default"
            raise ConfigError(
                f"{_at(locations, *path)}: {'.'.join(path)}: expected one of {', '.join(known)}, got {name!r}{default}"
                f"{nearest(name, known)}"
            )
