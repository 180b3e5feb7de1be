"""What lies beside a tokenizer and decides how people use it: chat templates, roles of tokens, where answers end.

No id depends on it, so no fingerprint does. It is carried from a source's folder to `PREFIX.tokenizer/`, to every
checkpoint's `tokenizer/` and out again with an export, as bytes: a chat template is a program, which is not run here.
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
"""Folder of the templates that have a name; here they lie beside the others, as chat_template.NAME.jinja."""

_MOST_BYTES = 64 << 20
_NAMED = re.compile(r"chat_template\.([A-Za-z0-9_-]{1,100})\.jinja")


def companions_of(folder: Path, *, generation: bool = False) -> dict[str, bytes]:
    """The companions that lie in a tokenizer's folder, one of Hugging Face's or one that `Tokenizer.save` wrote.

    Args:
        folder: where
        generation: also how a model of this tokenizer generates (generation_config.json), which is the model's own

    Returns:
        contents by file name.

    Raises:
        DataError: one that cannot be read, is too large, or a template with a name that is none.
    """
    paths = {name: folder / name for name in (CONFIG, SPECIAL, TEMPLATE, *([GENERATION] if generation else ()))}
    paths |= {path.name: path for path in folder.glob("chat_template.*.jinja")}
    paths |= {f"chat_template.{path.stem}.jinja": path for path in (folder / TEMPLATES).glob("*.jinja")}
    return {name: _read(name, path) for name, path in sorted(paths.items()) if path.is_file()}


def place_of(name: str) -> str:
    """Where a companion lies in a folder that transformers reads."""
    named = _NAMED.fullmatch(name)
    return name if named is None else f"{TEMPLATES}/{named[1]}.jinja"


def write_companions(folder: Path, companions: Mapping[str, bytes]) -> None:
    """Writes them into the folder of a tokenizer that `Tokenizer.save` writes."""
    for name, content in companions.items():
        (folder / name).write_bytes(content)


def _read(name: str, path: Path) -> bytes:
    if name not in (CONFIG, SPECIAL, TEMPLATE, GENERATION) and not _NAMED.fullmatch(name):
        raise DataError(f"{path}: expected a chat template's name of letters, digits, _ and -, got {path.stem[:100]!r}")
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise DataError(f"{path}: expected at most {_MOST_BYTES:,} bytes, got {size:,}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
