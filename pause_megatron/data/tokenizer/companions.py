"""Companion files of a tokenizer: chat templates, roles of special tokens and generation settings.

No id depends on them, so the fingerprint does not. They are copied from a source's folder to `PREFIX.tokenizer/`, to
every checkpoint's `tokenizer/` and to an export, as bytes: a chat template is a program, which is never run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pause_megatron.errors import DataError

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
"""Folder of the named templates in transformers; this project stores them as chat_template.NAME.jinja."""

_MOST_BYTES = 64 << 20
_NAMED = re.compile(r"chat_template\.([A-Za-z0-9_-]{1,100})\.jinja")


def companions_of(folder: Path, *, generation: bool = False) -> dict[str, bytes]:
    """Return the companions in a tokenizer's folder, of Hugging Face or of `Tokenizer.save`.

    Args:
        folder: Folder of the tokenizer.
        generation: Whether to include generation_config.json, which belongs to a model.

    Returns:
        Contents by file name.

    Raises:
        DataError: A file cannot be read or is too large, or the name of a template is invalid.
    """
    paths = {name: folder / name for name in (CONFIG, SPECIAL, TEMPLATE, *([GENERATION] if generation else ()))}
    paths |= {path.name: path for path in folder.glob("chat_template.*.jinja")}
    paths |= {f"chat_template.{path.stem}.jinja": path for path in (folder / TEMPLATES).glob("*.jinja")}
    return {name: _read(name, path) for name, path in sorted(paths.items()) if path.is_file()}


def named(name: str) -> str | None:
    """Return the NAME of a companion chat_template.NAME.jinja; None for another file."""
    match = _NAMED.fullmatch(name)
    return match and match[1]


def place_of(name: str) -> str:
    """Return the path of a companion in a folder that transformers reads."""
    template = named(name)
    return name if template is None else f"{TEMPLATES}/{template}.jinja"


def write_companions(folder: Path, companions: Mapping[str, bytes]) -> None:
    """Write companions into the folder of a tokenizer.

    Args:
        folder: Folder of the tokenizer, which exists.
        companions: Contents by file name.
    """
    for name, content in companions.items():
        (folder / name).write_bytes(content)


def _read(name: str, path: Path) -> bytes:
    if name not in (CONFIG, SPECIAL, TEMPLATE, GENERATION) and named(name) is None:
        raise DataError(f"{path}: expected a chat template's name of letters, digits, _ and -, got {path.stem[:100]!r}")
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise DataError(f"{path}: expected at most {_MOST_BYTES:,} bytes, got {size:,}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
