"""JSON objects in files as typed, frozen models: reading with errors that name the field, writing field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from pause_megatron.errors import DataError

Number = int | float
"""A JSON number. An integer stays an integer, so that a file read and written again has the same bytes."""


class TypedJson(BaseModel):
    """A JSON object with known keys; the fields are in the order of the file. Unknown keys are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), ser_json_inf_nan="constants")

    @classmethod
    def parse(cls, content: object, where: str) -> Self:
        """Return the object with its fields checked.

        Args:
            content: What the JSON parser returned.
            where: Location for messages (file, or file and line).

        Raises:
            DataError: A field is missing or has another type.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DataError(f"{where}: {_problem(error)}") from None


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Args:
        content: The text, UTF-8.
        where: Place of the text, for messages.

    Raises:
        DataError: The text is no JSON object.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: damaged: expected a JSON object, got {content[:60]!r} ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: damaged: expected a JSON object, got {content[:60]!r}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DataError: The file cannot be read, or holds no JSON object.
    """
    try:
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


_WORDS = {
    "string_type": "a text",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
}


def _problem(error: ValidationError) -> str:
    """Return the first problem as "FIELD: expected X, got Y"."""
    first = error.errors()[0]
    field = ""
    for part in first["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    if first["type"] == "missing":
        return f"{field}: expected a value, got none"
    wanted = _WORDS.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{field + ': ' if field else ''}expected {wanted}, got {repr(first['input'])[:60]}"
