"""A chat template that appends the pauses, so that any server that renders chats puts them at the right place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.errors import ConfigError, DataError

FILE_NAME = "chat_template.jinja"

# For a base model: the messages' texts as they are, a line each.
_PLAIN = """\
{%- for message in messages %}
{{- message['content'] }}{{- '\\n' if not loop.last }}
{%- endfor %}"""

# A template works on text, where the pause token's name is the pause: what a user writes must not turn into pauses.
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
    """The tokenizer's chat template with M pauses after the generation prompt.

    A tokenizer without a chat template gets a plain one: its BOS, if it puts one before texts, and the messages' texts,
    a line each. Renderers may give another M as the variable `pauses`.

    Args:
        tokenizer: a Hugging Face tokenizer that has the pause token as an added special token.
        pauses: M.
        tokens: names of the pause tokens, which are used in turn.

    Returns:
        a Jinja template for `tokenizer.chat_template` or `chat_template.jinja`.

    Raises:
        ConfigError: M below 0.
        DataError: the tokenizer lacks one of them, or has a template of several parts.
    """
    if pauses < 0:
        raise ConfigError(f"pauses: expected 0 or more, came {pauses}")
    for token in tokens:
        added = tokenizer.added_tokens_decoder.get(tokenizer.get_vocab().get(token))
        if added is None or not added.special:
            raise DataError(f"the tokenizer has no special token {token}, so a chat template cannot append it")
    template = tokenizer.chat_template
    if template is None:
        template = _beginning(tokenizer) + _PLAIN
    if not isinstance(template, str):
        raise DataError("the tokenizer has several chat templates; expected one")
    guard, append = (part.replace("TOKENS", json.dumps(list(tokens))) for part in (_GUARD, _PAUSES))
    return guard + template + append.replace("COUNT", str(pauses)).replace("SIZE", str(len(tokens)))


def _beginning(tokenizer: Any) -> str:
    """What stands before a text in a template, so that the text gets the ids that encoding it alone gives it.

    A SentencePiece text behind a BOS lacks the space that would have been put before its first word.
    """
    wanted = tokenizer("a")["input_ids"]
    if wanted[:1] != [tokenizer.bos_token_id]:
        return ""
    spaced = tokenizer(f"{tokenizer.bos_token} a", add_special_tokens=False)["input_ids"]
    return "{{- bos_token ~ ' ' }}" if spaced == wanted else "{{- bos_token }}"


def write_chat_template(folder: str | Path, pauses: int) -> Path:
    """Give a model folder's tokenizer the template of `pause_chat_template`, as its `chat_template.jinja`.

    The pause tokens are those that config.json names ("pause": {"tokens": [...]}), else `<pause>`.

    Returns:
        the file written.

    Raises:
        ConfigError, DataError: as `pause_chat_template`; no tokenizer there, or its template appends pauses already.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        entry = PretrainedConfig.get_config_dict(str(folder), local_files_only=True)[0].get("pause") or {}
    except Exception as error:  # transformers raises many kinds: each means that there is no usable tokenizer
        raise DataError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    if isinstance(tokenizer.chat_template, str) and PAUSE_TOKEN in tokenizer.chat_template:
        raise DataError(f"{Path(folder) / FILE_NAME}: it appends pauses already; remove it first")
    path = Path(folder) / FILE_NAME
    path.write_text(pause_chat_template(tokenizer, pauses, entry.get("tokens") or (PAUSE_TOKEN,)), encoding="utf-8")
    return path
