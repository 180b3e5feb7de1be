"""Every configuration key with type, range, default and meaning, read off `schema.py`: for errors and for --help."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types

from pause_megatron.config.identity import LOCAL_KEYS
from pause_megatron.config.schema import RunConfig, Section

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """One `section.name` of the configuration."""

    path: str
    kind: type  # int, float, str, bool, or tuple for a list of texts
    choices: tuple[str, ...]  # the values of a Literal, else empty
    optional: bool  # null is allowed
    limits: str  # ">= 1, < 2", or "" where there are none
    default: Any
    description: str
    local: bool  # may differ between the ranks of a run, which compare the content

    @property
    def expected(self) -> str:
        """What may stand here, in words: 'an integer >= 1, or null'."""
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
        """The default as it would be written in YAML; "none" for an empty list."""
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
    signs = ((annotated_types.Ge, ">=", "ge"), (annotated_types.Gt, ">", "gt"))
    signs += ((annotated_types.Le, "<=", "le"), (annotated_types.Lt, "<", "lt"))
    limits = [
        f"{sign} {getattr(rule, attribute):g}"
        for rule in field.metadata
        for cls, sign, attribute in signs
        if isinstance(rule, cls)
    ]
    path, text = f"{section}.{name}", field.description or ""
    return Key(path, kind, choices, optional, ", ".join(limits), field.default, text, path in LOCAL_KEYS)


def sections() -> dict[str, type[Section]]:
    """The groups of keys, in the order of the schema."""
    return {name: field.annotation for name, field in RunConfig.model_fields.items()}


@cache
def keys() -> dict[str, Key]:
    """All keys by their dotted path, in the order of the schema."""
    found = (
        _key(section, field.alias or name, field)
        for section, cls in sections().items()
        for name, field in cls.model_fields.items()
    )
    return {key.path: key for key in found}
