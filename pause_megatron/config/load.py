"""Load a configuration: YAML file and `key.path=value` overrides, parsed, resolved and checked once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pause_megatron.config.follow import Sources, follow_epochs, follow_values, note_unused
from pause_megatron.config.keys import Key, keys, sections
from pause_megatron.config.model_from import SHAPE, with_initial_sizes
from pause_megatron.config.presets import fill_sizes, preset_values
from pause_megatron.config.renamed import with_new_names
from pause_megatron.config.rules import check
from pause_megatron.config.schema import (
    ResolvedConfig,
    ResolvedData,
    RunConfig,
    ScheduledConfig,
    ScheduledTrain,
    TrainSection,
)
from pause_megatron.config.spelling import nearest
from pause_megatron.config.text import Entry, read_entries, read_override, write_yaml
from pause_megatron.errors import ConfigError

log = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

_LOOPS = ("model.loops", "model.loop_layers")
# A key given by a later source discards the values of these keys in earlier sources.
_REPLACES = {
    "train.steps": ("train.tokens", "finetune.epochs"),
    "train.tokens": ("train.steps", "finetune.epochs"),
    "finetune.epochs": ("train.steps", "train.tokens"),
    "model.preset": tuple(f"model.{name}" for name in SHAPE if f"model.{name}" not in _LOOPS),
    "data.valid_prefix": ("data.split",),
    "model.from": ("model.preset", *(f"model.{name}" for name in SHAPE)),
}


_SHORT = {"objective": "objective.name"}
"""Sections whose name alone, with a text, stands for one of their keys."""


def load(
    path: str | Path | None = None,
    *,
    recipe: str | None = None,
    overrides: Iterable[str] = (),
    notify: Callable[[str], object] | None = None,
) -> ResolvedConfig:
    """Load a file or a recipe, apply overrides, fill in the values that follow from them, and check the result.

    Args:
        path: YAML file; None for a recipe or the defaults.
        recipe: Name of a recipe that ships (see `recipe_names`); None for a file or the defaults.
        overrides: `section.name=value` texts, each value a YAML scalar or list; later ones win.
        notify: Function that takes one line of text. It is called for each value of the file that was adjusted to an
            override, and for each key that a finetuning does not use (see `follow`). Keys under an earlier name (see
            `renamed`) are logged as warnings.

    Returns:
        The resolved configuration: sizes of the preset and the splits filled in; `train.steps` and `train.tokens` both
        known where one of them was given.

    Raises:
        ConfigError: A key does not exist, a value has the wrong type or range, or keys contradict each other; the
            message has the file and line (or "command line"), what was expected and what was given.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: expected a list of key=value texts, got one text: {overrides!r}")
    if path is not None and recipe is not None:
        raise ConfigError(f"expected a file or a recipe, got both: {path} and {recipe}")
    source = recipe_path(recipe) if recipe is not None else path
    config, deprecated, notes = _load(source, overrides)
    for line in deprecated:
        log.warning(line)
    if notify is not None:
        for line in notes:
            notify(line)
    return config


def load_saved(path: str | Path) -> ResolvedConfig:
    """Load the `config.yaml` of a run or checkpoint: as `load`, without warnings about keys under earlier names.

    A file from before a key existed has the value that it had in effect: `task.held_out` is null.

    Args:
        path: The file.

    Raises:
        ConfigError: As `load`.
    """
    known = any(entry.path == "task.held_out" for entry in _read_file(Path(path)))
    return _load(path, () if known else ("task.held_out=null",))[0]


def _load(source: str | Path | None, overrides: Iterable[str]) -> tuple[ResolvedConfig, list[str], list[str]]:
    """Return the configuration, and lines about its deprecated keys and about its adjusted or unused values."""
    layers: list[list[Entry]] = []
    deprecated: list[str] = []
    for written in ([] if source is None else _read_file(Path(source)), map(read_override, overrides)):
        layer, lines = with_new_names(written)
        layers.append(layer)
        deprecated += lines
    entries = with_initial_sizes(_merge(layers))
    given = {entry.path: entry.where for entry in entries.values() if entry.value is not None}
    sources = Sources(frozenset(entry.path for entry in layers[-1] if entry.path in given), given)
    parsed = _parse(entries)
    of_preset = {f"model.{name}": f"preset {parsed.model.preset}" for name in preset_values(parsed.model)}
    config = follow_values(resolve(follow_epochs(parsed, sources)), sources)
    check(config, given | of_preset)
    note_unused(config, sources, {entry.path for entry in layers[0]})
    return config, deprecated, sources.notes


def dump(config: ResolvedConfig) -> str:
    """Return a configuration as YAML; loading it gives the same configuration.

    Args:
        config: Resolved configuration.
    """
    return write_yaml(config.model_dump(mode="json"))


def recipe_names() -> tuple[str, ...]:
    """Return the names that `load(recipe=...)` accepts."""
    return tuple(sorted(file.stem for file in RECIPES.glob("*.yaml")))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: One of `recipe_names`.

    Raises:
        ConfigError: No recipe has that name.
    """
    names = recipe_names()
    if name not in names:
        raise ConfigError(f"--recipe: expected one of {', '.join(names)}; got {name!r}{nearest(name, names)}")
    return RECIPES / f"{name}.yaml"


def resolve(config: RunConfig) -> ResolvedConfig:
    """Fill in values that follow from other keys: model sizes, steps from tokens or the reverse, splits.

    Steps from tokens are rounded up.

    Args:
        config: Keys as they were written.

    Raises:
        ConfigError: A size of the model is missing.
    """
    steps, tokens = _length(config)
    split = config.data.split
    if split is None:
        split = "1,0,0" if config.data.valid_prefix else "99,1,0"
    return ResolvedConfig(
        **_sections(config)
        | {
            "data": ResolvedData(**{**config.data.model_dump(), "split": split}),
            "model": fill_sizes(config.model),
            "train": TrainSection(**{**config.train.model_dump(), "steps": steps, "tokens": tokens}),
        }
    )


def scheduled(config: ResolvedConfig) -> ScheduledConfig:
    """Return the configuration with the type that has a number of steps, after checking that it is known.

    Args:
        config: Resolved configuration.

    Raises:
        ConfigError: Neither `train.steps` nor `train.tokens` was given.
    """
    steps, tokens = _length(config)
    if steps is None or tokens is None:
        raise ConfigError("train.steps or train.tokens: expected one of them, got neither")
    train = ScheduledTrain(**{**config.train.model_dump(), "steps": steps, "tokens": tokens})
    return ScheduledConfig(**_sections(config) | {"train": train})


def _length(config: RunConfig) -> tuple[int | None, int | None]:
    """Return steps and raw tokens of a run: each follows from the other; None where neither is given."""
    per_step = config.batch.global_size * config.data.sequence_length
    steps, tokens = config.train.steps, config.train.tokens
    if steps is None and tokens is not None:
        steps = -(-tokens // per_step)
    elif steps is not None and tokens is None:
        tokens = steps * per_step
    return steps, tokens


def _sections(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).model_fields}


def _read_file(path: Path) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}"
        ) from None
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from None
    return read_entries(text, str(path))


def _merge(layers: list[list[Entry]]) -> dict[str, Entry]:
    merged: dict[str, Entry] = {}
    for layer in layers:
        given = {entry.path: entry for entry in map(_typed, map(_whole, layer))}
        for path, entry in given.items():
            if entry.value is not None:
                for replaced in _replaced(path, merged):
                    merged.pop(replaced, None)
        merged |= given
    return merged


def _replaced(path: str, merged: Mapping[str, Entry]) -> list[str]:
    """Return the keys of earlier sources that a key discards; a looped recipe loops the weights of model.from too."""
    loops = merged.get("model.loops")
    kept = () if loops is None or loops.value == 1 else _LOOPS
    return [name for name in _REPLACES.get(path, ()) if name not in kept]


def _whole(entry: Entry) -> Entry:
    """Return the entry of the key that a section's name alone stands for."""
    short = entry.path in _SHORT and isinstance(entry.value, str)
    return Entry(_SHORT[entry.path], entry.value, entry.text, entry.where) if short else entry


def _typed(entry: Entry) -> Entry:
    """Refuse an unknown key. A text key keeps a scalar as it was written; an integer key accepts 2e9."""
    key, value = _known(entry), entry.value
    if key.kind is str and isinstance(value, (bool, int, float)):
        value = entry.text
    elif key.kind is str and isinstance(value, list) and entry.text:  # [0-9] on a command line is a text
        value = entry.text.strip()
    elif key.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    return Entry(entry.path, value, entry.text, entry.where)


def _known(entry: Entry) -> Key:
    key = keys().get(entry.path)
    if key is not None:
        return key
    section, _, name = entry.path.partition(".")
    if section in sections() and not name:
        raise ConfigError(f"{entry.where}: {section}: expected a group of keys, got {entry.value!r}")
    # The same name in another section: `lr` and `train.lr` are `optim.lr`.
    namesakes = [path for path in keys() if path.partition(".")[2] == (name or section)]
    same_name = f". Did you mean {' or '.join(map(repr, namesakes))}?" if namesakes else ""
    if section in sections():
        names = [path.partition(".")[2] for path in keys() if path.startswith(f"{section}.")]
        guess = nearest(name, names).replace("'", f"'{section}.", 1) or same_name
        guess = guess or nearest(entry.path, keys(), cutoff=0.8)  # transposed letters of a short name
        hint = guess or f". Keys of {section}: {', '.join(names)}"
    else:
        hint = "" if name else same_name
        hint = hint or nearest(entry.path, keys()) or nearest(section, sections())
        hint = hint or f". Groups: {', '.join(sections())}"
    raise ConfigError(f"{entry.where}: unknown key {entry.path!r}{hint}")


def _parse(entries: Mapping[str, Entry]) -> RunConfig:
    nested: dict[str, dict[str, Any]] = {}
    for path, entry in entries.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = entry.value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        problems = {".".join(map(str, problem["loc"][:2])): problem for problem in reversed(error.errors())}
    raise ConfigError("\n".join(_wrong(entries[path], keys()[path], problems[path]) for path in reversed(problems)))


def _wrong(entry: Entry, key: Key, problem: Any) -> str:
    if problem["type"] == "value_error":  # raised by the validator of paths
        return f"{entry.where}: {key.path}: {problem['ctx']['error']}"
    guess = nearest(entry.value, key.choices) if key.choices and isinstance(entry.value, str) else ""
    got = "null" if entry.value is None else repr(entry.value)
    return f"{entry.where}: {key.path}: expected {key.expected}; got {got}{guess}"
