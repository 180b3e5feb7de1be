"""YAML with line numbers: text to flat entries or a tree, and values back to text. Plain data only.

PyYAML does the parsing. This module adds two things to it:

- The "FILE:LINE" and the written text of each value, read off PyYAML's node graph, for error messages.
- The scalars of YAML 1.2: `3e-4` is a number; `no`, `1:30` and `2026-11-23` are text. PyYAML's own rules (YAML 1.1)
  give text, false, ninety and a date.

ruamel.yaml would replace the second part only. It keeps line numbers, but neither a scalar's written text (a text key
keeps `007`) nor the refusal of tags, dates and anchored groups, and would be one more dependency.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from pause_megatron.errors import ConfigError

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+",
        list("-+.0123456789"),
    ),
)


_PLAIN_TAGS = {"null", "bool", "int", "float", "str", "seq", "map"}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute; filled below)


class _Dumper(yaml.SafeDumper):
    """A dumper with the rules of 1.1 and 1.2, so that text is quoted where either would read something else."""


for _tag, _pattern, _first in _SCALARS:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Double quotes escape characters that are not printable; other styles turn unusual line ends into blanks.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Entry:
    """One key with its value and place.

    Attributes:
        path: "section.name"; "section" where the section is not a group of keys.
        value: Plain value: None, bool, int, float, str, or a list of these.
        text: A scalar as it was written, without quotes; "" for a list in a file.
        where: "FILE:LINE" or "command line".
    """

    path: str
    value: Any
    text: str
    where: str


def read_entries(text: str, name: str) -> list[Entry]:
    """Read a YAML document of two levels as a flat list.

    Args:
        text: The document.
        name: Its name in messages, a path.

    Returns:
        The entries in the order of the document; none for an empty document.

    Raises:
        ConfigError: The text is not YAML, repeats a key, nests groups too deep, or has a tag for an object.
    """
    root = _compose(text, name)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{name}:{root.start_mark.line + 1}: expected groups of keys ('model:', 'data:'), got a value"
        )
    entries = []
    for section, node, _ in _items(root, name, ""):
        if isinstance(node, yaml.MappingNode):
            entries += [
                Entry(f"{section}.{key}", *_value(child, name), where)
                for key, child, where in _items(node, name, f"{section}.")
            ]
        elif not (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
            entries.append(Entry(section, *_value(node, name), _where(node, name)))
    return entries


def read_tree(text: str, name: str) -> tuple[Any, dict[tuple[str, ...], str]]:
    """Read a YAML document of any depth: groups as dictionaries, lists as tuples, plain values.

    Args:
        text: The document.
        name: Its name in messages, a path.

    Returns:
        The value, and "NAME:LINE" of each part by its path; positions in a list are "0", "1", ...

    Raises:
        ConfigError: The text is not YAML, repeats a key, or has a tag for an object.
    """
    places: dict[tuple[str, ...], str] = {}

    def build(node: yaml.Node, path: tuple[str, ...], where: str) -> Any:
        _refuse_tag(node, name)
        places[path] = where
        if isinstance(node, yaml.MappingNode):
            prefix = "".join(f"{part}." for part in path)
            return {key: build(child, (*path, key), at) for key, child, at in _items(node, name, prefix)}
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return tuple(build(child, (*path, str(index)), _where(child, name)) for index, child in items)
        return _value(node, name)[0]

    root = _compose(text, name)
    return (None, {}) if root is None else (build(root, (), f"{name}:1"), places)


def read_override(override: str) -> Entry:
    """Parse one `section.name=value` of the command line.

    Args:
        override: The argument; its value is a YAML scalar or list, else plain text.

    Raises:
        ConfigError: The argument has no "=", or no key before it.
    """
    path, equals, text = override.partition("=")
    where = "command line"
    if not equals or not path.strip():
        raise ConfigError(f"{where}: expected key.path=value (for example optim.lr=3e-4), got {override!r}")
    try:
        node = _compose(text, where)
    except ConfigError:
        return Entry(path.strip(), text, text, where)
    listed = isinstance(node, yaml.SequenceNode) and not node.flow_style  # "- x"
    if node is None or isinstance(node, yaml.MappingNode) or listed:
        return Entry(path.strip(), text.strip() or None, text, where)
    try:
        value, written = _value(node, f"{where}: {path.strip()}")
    except ConfigError:  # a text that begins like a list, such as the regular expression [:;]
        if isinstance(node, yaml.SequenceNode):
            return Entry(path.strip(), text.strip(), text, where)
        raise
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and isinstance(value, str):  # `#` and `&` are no comment and no anchor on a command line
        value = text.strip()
    return Entry(path.strip(), value, text if plain or isinstance(value, list) else written, where)


def write_yaml(data: dict[str, Any]) -> str:
    """Return nested dictionaries of plain values as YAML in block style, keys in their order.

    Args:
        data: What `read_entries` reads, nested.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from None


def _where(node: yaml.Node, name: str) -> str:
    return f"{name}:{node.start_mark.line + 1}"


def _kind(node: yaml.Node) -> str:
    return "mapping" if isinstance(node, yaml.MappingNode) else "sequence"


def _refuse_tag(node: yaml.Node, name: str) -> None:
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
        raise ConfigError(f"{_where(node, name)}: expected plain data, got the YAML tag {node.tag!r}")


def _items(node: yaml.MappingNode, name: str, prefix: str) -> Iterator[tuple[str, yaml.Node, str]]:
    _refuse_tag(node, name)
    seen: dict[str, str] = {}
    for key, value in node.value:
        where = _where(key, name)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: expected a key, got a {_kind(key)}")
        if key.value in seen:
            raise ConfigError(f"{where}: {prefix}{key.value} is given twice; the first time at {seen[key.value]}")
        seen[key.value] = where
        yield key.value, value, where


def _value(node: yaml.Node, name: str) -> tuple[Any, str]:
    """Return the value of a node and, for a scalar, its text."""
    loader = _Loader("")
    _refuse_tag(node, name)
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        _refuse_tag(item, name)
        if not isinstance(item, yaml.ScalarNode):
            raise ConfigError(f"{_where(item, name)}: expected a single value or a list of values, got a {_kind(item)}")
    try:
        values = [loader.construct_object(item) for item in items]
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{_where(node, name)}: {problem}") from None
    finally:
        loader.dispose()
    if isinstance(node, yaml.SequenceNode):
        return values, ""
    return values[0], node.value
