"""A grid file and `path=value` overrides -> Grid, with errors that name the line. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pause_megatron.config.spelling import nearest
from pause_megatron.config.text import read_override, read_tree, write_yaml
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.schema import Grid

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "experiments"
_COMMAND_LINE = "command line"

Places = dict[tuple[str, ...], str]


def recipe_names() -> tuple[str, ...]:
    """Experiments that ship."""
    return tuple(sorted(file.stem for file in RECIPES.glob("*.yaml")))


def load_grid(path: str | Path | None = None, *, recipe: str | None = None, overrides: Iterable[str] = ()) -> Grid:
    """Read an experiment.

    Args:
        path: a grid file. recipe: a name of `recipe_names`. Exactly one of them.
        overrides: `data.prefix=...`, `tasks.gsm8k.limit=100`, `finetune.set.train.steps=50`, ...

    Raises:
        ConfigError: no such file or recipe, not YAML, an unknown key, a value that does not fit, or a name that is
            used but not defined; with file and line.
    """
    if (path is None) == (recipe is None):
        raise ConfigError("expected an experiment: --recipe NAME or --config FILE, one of them")
    file = _recipe_path(recipe) if recipe is not None else Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {file} cannot be read: {error}") from None
    tree, places = read_tree(text, str(file))
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}:1: expected groups of keys ('models:', 'variants:'), got {tree!r}")
    for override in overrides:
        _put(tree, places, override)
    try:
        grid = Grid.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_message(problem, places) for problem in error.errors()))) from None
    _check_names(grid, places)
    return grid


def dump_grid(grid: Grid) -> str:
    """The grid as YAML; `load_grid` of it gives the same grid."""
    return write_yaml(grid.model_dump(mode="json"))


def _recipe_path(name: str) -> Path:
    names = recipe_names()
    if name not in names:
        raise ConfigError(f"--recipe: expected one of {', '.join(names)}, got {name!r}{nearest(name, names)}")
    return RECIPES / f"{name}.yaml"


def _put(tree: dict[str, Any], places: Places, override: str) -> None:
    """Set one value; below `set`, the rest of the path is one key of a run."""
    entry = read_override(override)
    head, is_run_key, tail = entry.path.partition(".set.")
    path = (*head.split("."), *(("set", tail) if is_run_key else ()))
    group = tree
    for name in path[:-1]:
        group = group.setdefault(name, {})
        if not isinstance(group, dict):
            raise ConfigError(f"{_COMMAND_LINE}: {entry.path}: {name} is a value, not a group of keys")
    group[path[-1]] = tuple(entry.value) if isinstance(entry.value, list) else entry.value
    places[path] = _COMMAND_LINE


def _message(problem: Any, places: Places) -> str:
    """One error as FILE:LINE: path: what is wrong, got what."""
    path = tuple(str(part) for part in problem["loc"])
    while path not in places and len(path) > 1:  # a missing key, or the branch of a union that pydantic names
        path = path[:-1]
    where = _at(places, *path)
    shown = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _keys_of(path[:-1])
        return f"{where}: unknown key {shown!r}{nearest(path[-1], known) or '. Keys here: ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: {'.'.join(map(str, problem['loc']))}: expected a value, got none"
    return f"{where}: {shown}: {_plain(problem['msg'])}, got {problem['input']!r}"


def _at(places: Places, *path: str) -> str:
    """Where something stands: FILE:LINE of it, or of the nearest group around it; else the command line."""
    while path and path not in places:
        path = path[:-1]
    return places[path] if path else _COMMAND_LINE


def _plain(text: str) -> str:
    for theirs, ours in (
        ("Input should be a valid tuple", "expected a list"),
        ("Tuple should have", "expected a list with"),
        (" after validation, not 0", ""),
        ("Input should be", "expected"),
        ("String should match pattern", "expected the form"),
    ):
        text = text.replace(theirs, ours)
    return text


def _keys_of(path: tuple[str, ...]) -> list[str]:
    """Keys of the group at a path, read off the schema."""
    group: type[BaseModel] | None = Grid
    named = False  # whether the next part is a name of the user's, or a position in a list
    for part in path:
        if named:
            named = False
        elif group is not None and part in group.model_fields:
            annotation = group.model_fields[part].annotation
            members = [member for member in (annotation, *get_args(annotation)) if isinstance(member, type)]
            group = next((member for member in members if issubclass(member, BaseModel)), None)
            named = get_origin(annotation) in (dict, tuple)
    return list(group.model_fields) if group else []


def _check_names(grid: Grid, places: Places) -> None:
    """Refuse a name of a model, variant or task that is used and not defined.

    Raises:
        ConfigError: with the nearest name.
    """
    used = [(("baseline",), grid.baseline, grid.variants)]
    for name, model in grid.models.items():
        if model.budget:
            used.append((("models", name, "budget", "like"), model.budget.like, grid.models))
        if (model.recipe is None) == (model.config is None):
            raise ConfigError(f"{_at(places, 'models', name)}: models.{name}: expected recipe or config, one of them")
    for name, variant in grid.variants.items():
        used.append((("variants", name, "model"), variant.model, grid.models))
        used += [(("variants", name, "tasks"), task, grid.tasks) for task in variant.tasks or ()]
        if variant.finetune == "standard" and variant.pauses:
            raise ConfigError(
                f"{_at(places, 'variants', name)}: variants.{name}.pauses: expected none with finetune: standard "
                f"(for pauses at inference only: inference.pauses), got {variant.pauses}"
            )
    for index, curve in enumerate(grid.curves):
        used += [(("curves", str(index), "variants"), variant, grid.variants) for variant in curve.variants]
        used += [(("curves", str(index), "tasks"), task, grid.tasks) for task in curve.tasks or ()]
    for path, name, known in used:
        if name not in known:
            raise ConfigError(
                f"{_at(places, *path)}: {'.'.join(path)}: expected one of {', '.join(known)}, got {name!r}"
                f"{nearest(name, known)}"
            )
