"""Every configuration key with its type, range, default and description, read off `schema.py` for errors and --help."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types

from pause_megatron.config.identity import LOCAL_KEYS
from pause_megatron.config.schema import RunConfig
from pause_megatron.config.section import Section

_LIMITS: tuple[tuple[type, str, str], ...] = (
    *((annotated_types.Ge, ">=", "ge"), (annotated_types.Gt, ">", "gt")),
    *((annotated_types.Le, "<=", "le"), (annotated_types.Lt, "<", "lt")),
)
_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        path: Dotted path, `section.name`.
        kind: int, float, str, bool, or tuple for a list of texts.
        choices: Values of a Literal, else empty.
        optional: Whether null is allowed.
        limits: Range such as ">= 1, < 2"; "" where there is none.
        default: Value where the key is left out.
        description: Meaning, as --help shows it.
        local: Whether it may differ between the ranks of a run, which then compare the content it leads to.
    """

    path: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    limits: str
    default: Any
    description: str
    local: bool

    @property
    def expected(self) -> str:
        """The allowed values in words, for example 'an integer >= 1, or null'."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        elif self.kind is tuple:
            words = "text, or a list of texts"
        else:
            words = _NAMES[self.kind]
        if self.limits:
            words += f" {self.limits}"
        return f"{words}, or null" if self.optional else words

    @property
    def default_text(self) -> str:
        """The default as YAML; "none" for an empty list."""
        if self.default is None or isinstance(self.default, bool):
            return {None: "null", True: "true", False: "false"}[self.default]
        return "none" if self.default == () else f"{self.default}"


def _key(section: str, name: str, field: Any) -> Key:
    annotation, optional = field.annotation, False
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        optional = len(members) < len(get_args(annotation))
        annotation = members[0]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    choices = tuple(get_args(annotation)) if get_origin(annotation) is Literal else ()
    kind = str if choices else (get_origin(annotation) or annotation)
    limits = [
        f"{sign} {getattr(rule, attribute):g}"
        for rule in field.metadata
        for cls, sign, attribute in _LIMITS
        if isinstance(rule, cls)
    ]
    path, text = f"{section}.{name}", field.description or ""
    return Key(path, kind, choices, optional, ", ".join(limits), field.default, text, path in LOCAL_KEYS)


def sections() -> dict[str, type[Section]]:
    """Return the groups of keys by name, in the order of the schema."""
    fields = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {name: cls for name, cls in fields.items() if isinstance(cls, type) and issubclass(cls, Section)}


@cache
def keys() -> dict[str, Key]:
    """Return all keys by their dotted path, in the order of the schema."""
    every = (
        _key(section, field.alias or name, field)
        for section, cls in sections().items()
        for name, field in cls.model_fields.items()
    )
    return {key.path: key for key in every}
