"""Chat templates with pauses: a variant named "pause" beside a model's own template, which is not changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.companions import CONFIG, TEMPLATE, TEMPLATES, named, place_of
from pause_megatron.errors import DataError

VARIANT = "pause"
"""Name of the variant: `apply_chat_template(..., chat_template="pause")`."""

# A template renders text, in which the pause token's name is the pause: what users write must not turn into pauses.
# The names are compared as JSON, since some renderers escape "<" there.
_GUARD = """\
{%- set given = (messages | tojson) ~ ((tools | tojson) if tools else '') ~ \
((documents | tojson) if documents else '') %}
{%- for token in TOKENS if (token | tojson)[1:-1] in given %}
{{- raise_exception('a message spells ' ~ token ~ ', which would become a pause: send token ids instead') }}
{%- endfor %}"""

_PAUSES = """\
{%- if add_generation_prompt %}
{%- for index in range(pauses if pauses is defined else COUNT) %}{{- TOKENS[index % SIZE] }}{%- endfor %}
{%- endif %}"""


def with_pauses_appended(template: str, pauses: int, tokens: Sequence[str]) -> str:
    """Return a chat template that renders M pauses after the generation prompt.

    Args:
        template: A chat template.
        pauses: Number of pauses, M; renderers may give another in the variable `pauses`.
        tokens: Names of the pause tokens, which are used in turn.
    """
    guard, append = (part.replace("TOKENS", json.dumps(list(tokens))) for part in (_GUARD, _PAUSES))
    return guard + template + append.replace("COUNT", str(pauses)).replace("SIZE", str(len(tokens)))


def templates_of(config: Mapping[str, Any] | None, files: Mapping[str, str]) -> dict[str, str]:
    """Return the chat templates of a folder by name, as transformers finds them.

    Args:
        config: Content of tokenizer_config.json, which may have templates as a string or a list of named ones.
        files: Texts of the template files by companion name; with any of them, transformers ignores the config's.

    Raises:
        DataError: chat_template of the config is neither, or a name is no file name.
    """
    if files:
        return {named(name) or "default": text for name, text in files.items()}
    own = (config or {}).get("chat_template") or []
    entries = [{"name": "default", "template": own}] if isinstance(own, str) else own
    try:
        templates = {str(entry["name"]): str(entry["template"]) for entry in entries}
    except (TypeError, KeyError):
        raise DataError(
            f"{CONFIG}: chat_template: expected text, or a list of entries with name and template, got {str(own)[:80]}"
        ) from None
    for name in templates:
        if named(f"chat_template.{name}.jinja") is None:
            raise DataError(f"{CONFIG}: chat_template: expected names of letters, digits, _ and -, got {name[:100]!r}")
    return templates


def write_variant(folder: Path, templates: Mapping[str, str], pauses: int, tokens: Sequence[str]) -> Path:
    """Write the variant of the default template to a folder, beside the templates that it has.

    Args:
        folder: A transformers folder.
        templates: The folder's templates by name; see `templates_of`.
        pauses: Number of pauses, M.
        tokens: Names of the pause tokens.

    Returns:
        The file, `additional_chat_templates/pause.jinja`.

    Raises:
        DataError: Several templates and none named "default".
    """
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        raise DataError(f"{folder}: expected a chat template named default, got {names}")
    # transformers does not read those of tokenizer_config.json where there is a file: each becomes a file as well.
    texts = {**templates, VARIANT: with_pauses_appended(templates["default"], pauses, tokens)}
    for name, text in texts.items():
        path = folder / (TEMPLATE if name == "default" else place_of(f"chat_template.{name}.jinja"))
        path.parent.mkdir(exist_ok=True)
        if name == VARIANT or not path.exists():
            path.write_bytes(text.encode())
    return folder / TEMPLATES / f"{VARIANT}.jinja"


def templates_in(folder: Path) -> dict[str, str]:
    """Return the chat templates of a transformers folder by name.

    Args:
        folder: The folder.

    Raises:
        DataError: tokenizer_config.json or a template cannot be read; as for `templates_of`.
    """
    paths = {TEMPLATE: folder / TEMPLATE}
    paths |= {f"chat_template.{path.stem}.jinja": path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    try:
        files = {name: path.read_bytes().decode() for name, path in paths.items() if path.is_file()}
        config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: its chat templates cannot be read ({error})") from None
    return templates_of(config if isinstance(config, dict) else {}, files)


def add_variant(folder: Path, pause: Mapping[str, Any]) -> None:
    """Write the variant to an export if the model has a chat template and was finetuned with pauses after prompts.

    A template of that name that the source had, or a default one that appends pauses already, is left as it is.

    Args:
        folder: The export, with its tokenizer.
        pause: The "pause" entry of config.json.

    Raises:
        DataError: As for `templates_in`.
    """
    tokens, templates = pause["tokens"], templates_in(folder)
    taken = VARIANT in templates and tokens[0] not in templates[VARIANT]
    appended = pause["m_ft"] and pause["location"] == "append" and pause["filler"] is None
    if appended and not taken and "default" in templates and tokens[0] not in templates["default"]:
        write_variant(folder, templates, pause["m_ft"], tokens)
