"""Text templates with field names in braces. No attributes, indices or formats, so a template cannot reach code."""

from __future__ import annotations

import string
from typing import Protocol

ANSWER = "answer"
"""The name that stands for an accepted answer."""


def names_in(template: str) -> tuple[str, ...]:
    """Return the names in braces in their order, each once.

    Raises:
        ValueError: Braces do not pair, or hold something other than a name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            inside = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"expected the name of a field in braces (write {{{{ for a brace), got {inside!r}")
        names.append(name)
    return tuple(dict.fromkeys(names))


class Values(Protocol):
    """A mapping from names to texts."""

    def __getitem__(self, name: str, /) -> str: ...


def render(template: str, values: Values) -> str:
    """Return the template with each name replaced by its value. Braces in a value stay text.

    Args:
        template: The template.
        values: Text of each name.
    """
    return template.format_map(values)
