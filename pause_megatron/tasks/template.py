"""Text with names in braces. Names only: no attributes, no indices, no formats, so a template cannot reach code."""

from __future__ import annotations

import string
from typing import Protocol

ANSWER = "answer"


def names_in(template: str) -> tuple[str, ...]:
    """Names in braces, in order, each once.

    Raises:
        ValueError: braces that do not pair, or hold something else than a name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            inside = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"expected the name of a field in braces (write {{{{ for a brace); came {inside!r}")
        names.append(name)
    return tuple(dict.fromkeys(names))


class Values(Protocol):
    """Gives the text that stands for a name."""

    def __getitem__(self, name: str, /) -> str: ...


def render(template: str, values: Values) -> str:
    """The template with each name replaced by its value. What stands in a value is never read as a template."""
    return template.format_map(values)
