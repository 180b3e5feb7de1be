"""One record of a data set, with typed access to its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import DataError


@dataclass(frozen=True)
class Record:
    """One record. `where` says where it stands ("FILE:LINE"); `part` numbers what one record was split into."""

    values: Mapping[str, Any]
    where: str
    part: int | None = None

    def get(self, path: str) -> Any:
        """The value at a dotted path (`answers.text`). Raises DataError where there is none."""
        value: Any = self.values
        for depth, name in enumerate(names := path.split(".")):
            if not isinstance(value, Mapping):
                self.wrong(".".join(names[:depth]), f"an object with the field {name!r}", value)
            if name not in value:
                inside = f" in {'.'.join(names[:depth])!r}" if depth else ""
                raise DataError(
                    f"{self.where}: expected the field {path!r}; the fields{inside} are "
                    f"{', '.join(map(str, value)) or 'none'}{nearest(name, map(str, value))}"
                )
            value = value[name]
        return value

    def text(self, path: str) -> str:
        """A text that is not blank, without white space around it."""
        return self._stripped(path, self.get(path))

    def texts(self, path: str) -> tuple[str, ...]:
        """A list of such texts (at least one), or one text."""
        value = self.get(path)
        if isinstance(value, str):
            return (self._stripped(path, value),)
        if not isinstance(value, list) or not value:
            self.wrong(path, "a text or a list of texts", value)
        return tuple(self._stripped(f"{path}[{index}]", item) for index, item in enumerate(value))

    def any_text(self, path: str) -> str:
        """A text that may be empty, as it is written."""
        return self._characters(path, self.get(path))

    def index(self, path: str, size: int) -> int:
        """An integer (or its digits) in [0, size)."""
        value = self.get(path)
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value) else value
        if type(number) is not int or not 0 <= number < size:
            self.wrong(path, f"an index from 0 to {size - 1}", value)
        return number

    def wrong(self, path: str, expected: str, value: Any) -> NoReturn:
        """Raise the DataError of a field that is not what was expected."""
        raise DataError(f"{self.where}: field {path!r}: expected {expected}; came {_shown(value)}")

    def _stripped(self, path: str, value: Any) -> str:
        text = self._characters(path, value).strip()
        if not text:
            self.wrong(path, "a text that is not empty", value)
        return text

    def _characters(self, path: str, value: Any) -> str:
        if not isinstance(value, str):
            self.wrong(path, "a text", value)
        if not value.isascii() and (half := re.search("[\ud800-\udfff]", value)):
            self.wrong(path, f"characters (half of a UTF-16 pair stands at {half.start()})", value)
        return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    shortened = text if len(text) <= 60 else text[:60] + "..."
    kind = "" if isinstance(value, (str, int, float)) else f"{type(value).__name__} "
    return f"{kind}{shortened}"
