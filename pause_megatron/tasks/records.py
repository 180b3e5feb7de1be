"""Typed access to the fields of one record of a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import DataError


@dataclass(frozen=True)
class Record:
    """One record of a dataset.

    Attributes:
        values: Its fields.
        where: Its location for messages ("FILE:LINE").
        part: Number of this part, from 1, of a record that a transform split; None for a whole record.
    """

    values: Mapping[str, Any]
    where: str
    part: int | None = None

    def get(self, path: str) -> Any:
        """Return the value at a dotted path (`answers.text`).

        Raises:
            DataError: The record has no such field.
        """
        value: Any = self.values
        for depth, name in enumerate(names := path.split(".")):
            if not isinstance(value, Mapping):
                self.refuse(".".join(names[:depth]), f"an object with the field {name!r}", value)
            if name not in value:
                inside = f" in {'.'.join(names[:depth])!r}" if depth else ""
                raise DataError(
                    f"{self.where}: expected the field {path!r}, got the fields{inside} "
                    f"{', '.join(map(str, value)) or 'none'}{nearest(name, map(str, value))}"
                )
            value = value[name]
        return value

    def text(self, path: str) -> str:
        """Return a text that is not blank, stripped of white space."""
        return self._stripped(path, self.get(path))

    def texts(self, path: str) -> tuple[str, ...]:
        """Return the texts of a non-empty list, or one text as a tuple of one; each as in `text`."""
        value = self.get(path)
        if isinstance(value, str):
            return (self._stripped(path, value),)
        if not isinstance(value, list) or not value:
            self.refuse(path, "a text or a list of texts", value)
        return tuple(self._stripped(f"{path}[{index}]", item) for index, item in enumerate(value))

    def any_text(self, path: str) -> str:
        """Return a text as it is written; it may be empty."""
        return self._characters(path, self.get(path))

    def first_label(self, paths: Sequence[str]) -> str:
        """Return the first of several fields that is not blank, a text or an integer; "" if all of them are blank.

        Raises:
            DataError: The record has none of the fields, or one is neither a text nor an integer.
        """
        missing = 0
        for path in paths:
            try:
                value = self.get(path)
            except DataError:
                missing += 1
                if missing == len(paths):
                    raise
                continue
            if type(value) is int:
                return str(value)
            if value is not None and (text := self._characters(path, value).strip()):
                return text
        return ""

    def index(self, path: str, size: int) -> int:
        """Return an index, an integer or its digits, in [0, size).

        Args:
            path: Dotted path of the field.
            size: Number of options.
        """
        value = self.get(path)
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value) else value
        if type(number) is not int or not 0 <= number < size:
            self.refuse(path, f"an index from 0 to {size - 1}", value)
        return number

    def refuse(self, path: str, expected: str, value: Any) -> NoReturn:
        """Raise the DataError of a field with an unexpected value.

        Args:
            path: Dotted path of the field.
            expected: What was expected, in words.
            value: The value that the field has.
        """
        raise DataError(f"{self.where}: field {path!r}: expected {expected}, got {_shown(value)}")

    def _stripped(self, path: str, value: Any) -> str:
        text = self._characters(path, value).strip()
        if not text:
            self.refuse(path, "a text that is not empty", value)
        return text

    def _characters(self, path: str, value: Any) -> str:
        if not isinstance(value, str):
            self.refuse(path, "a text", value)
        if not value.isascii() and (half := re.search("[\ud800-\udfff]", value)):
            self.refuse(path, f"characters (half of a UTF-16 pair at {half.start()})", value)
        return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    shortened = text if len(text) <= 60 else text[:60] + "..."
    kind = "" if isinstance(value, (str, int, float)) else f"{type(value).__name__} "
    return f"{kind}{shortened}"
