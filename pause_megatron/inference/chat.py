"""Chat templates that append the pauses to the generation prompt, for servers that render chat messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.errors import ConfigError, DataError

FILE_NAME = "chat_template.jinja"

# For a base model: the content of the messages, a line each.
_PLAIN = """\
{%- for message in messages %}
{{- message['content'] }}{{- '\\n' if not loop.last }}
{%- endfor %}"""

# A template renders text, in which the pause token's name is the pause: user content must not turn into pauses.
_GUARD = """\
{%- for message in messages %}
{%- for token in TOKENS if message['content'] is string and token in message['content'] %}
{{- raise_exception('a message spells ' ~ token ~ ', which would become a pause: send token ids instead') }}
{%- endfor %}
{%- endfor %}"""

_PAUSES = """\
{%- if add_generation_prompt %}
{%- for index in range(pauses if pauses is defined else COUNT) %}{{- TOKENS[index % SIZE] }}{%- endfor %}
{%- endif %}"""


def pause_chat_template(tokenizer: Any, pauses: int, tokens: Sequence[str] = (PAUSE_TOKEN,)) -> str:
    """Return the tokenizer's chat template with M pauses after the generation prompt.

    A tokenizer without a chat template gets a plain one: its BOS, if it puts one before texts, and the content of the
    messages, a line each. Renderers may override M with the variable `pauses`.

    Args:
        tokenizer: A Hugging Face tokenizer that has the pause token as an added special token.
        pauses: Number of pauses, M.
        tokens: Names of the pause tokens, which are used in turn.

    Returns:
        A Jinja template for `tokenizer.chat_template` or `chat_template.jinja`.

    Raises:
        ConfigError: M below 0.
        DataError: The tokenizer lacks a pause token, or has several chat templates.
    """
    if pauses < 0:
        raise ConfigError(f"pauses: expected 0 or more, got {pauses}")
    for token in tokens:
        added = tokenizer.added_tokens_decoder.get(tokenizer.get_vocab().get(token))
        if added is None or not added.special:
            raise DataError(f"tokenizer: expected a special token {token}, which a chat template can append, got none")
    template = tokenizer.chat_template
    if template is None:
        template = _leading_tokens(tokenizer) + _PLAIN
    if not isinstance(template, str):
        raise DataError("tokenizer: expected one chat template, got several")
    guard, append = (part.replace("TOKENS", json.dumps(list(tokens))) for part in (_GUARD, _PAUSES))
    return guard + template + append.replace("COUNT", str(pauses)).replace("SIZE", str(len(tokens)))


def _leading_tokens(tokenizer: Any) -> str:
    """Template text before the first message, so that it gets the ids that encoding it alone gives it.

    SentencePiece does not put a space before a text that follows a BOS, so the template adds it.
    """
    expected = tokenizer("a")["input_ids"]
    if expected[:1] != [tokenizer.bos_token_id]:
        return ""
    spaced = tokenizer(f"{tokenizer.bos_token} a", add_special_tokens=False)["input_ids"]
    return "{{- bos_token ~ ' ' }}" if spaced == expected else "{{- bos_token }}"


def write_chat_template(folder: str | Path, pauses: int) -> Path:
    """Write the template of `pause_chat_template` to a model folder, as `chat_template.jinja`.

    The pause tokens are those that config.json names ("pause": {"tokens": [...]}), otherwise `<pause>`.

    Args:
        folder: A transformers folder with a tokenizer.
        pauses: Number of pauses, M.

    Returns:
        The file.

    Raises:
        ConfigError: As for `pause_chat_template`.
        DataError: As for `pause_chat_template`, no tokenizer in the folder, or a template that appends pauses already.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        entry = PretrainedConfig.get_config_dict(str(folder), local_files_only=True)[0].get("pause") or {}
    except Exception as error:  # transformers raises many kinds: each means that there is no usable tokenizer
        raise DataError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    if isinstance(tokenizer.chat_template, str) and PAUSE_TOKEN in tokenizer.chat_template:
        raise DataError(
            f"{Path(folder) / FILE_NAME}: expected no pauses, got a template that appends pauses already; remove it"
        )
    path = Path(folder) / FILE_NAME
    path.write_text(pause_chat_template(tokenizer, pauses, entry.get("tokens") or (PAUSE_TOKEN,)), encoding="utf-8")
    return path
