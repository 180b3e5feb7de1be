"""Chat templates that append the pauses to the generation prompt, for servers that render chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pause_megatron.data.tokenizer.companions import TEMPLATE
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.hf.chat_template import VARIANT, templates_in, with_pauses_appended, write_variant

# For a base model: the content of the messages, a line each.
_PLAIN = """\
{%- for message in messages %}
{{- message['content'] }}{{- '\\n' if not loop.last }}
{%- endfor %}"""


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
        DataError: The tokenizer lacks a pause token, or has several chat templates and none named "default".
    """
    if pauses < 0:
        raise ConfigError(f"pauses: expected 0 or more, got {pauses}")
    for token in tokens:
        added = tokenizer.added_tokens_decoder.get(tokenizer.get_vocab().get(token))
        if added is None or not added.special:
            raise DataError(f"tokenizer: expected a special token {token}, which a chat template can append, got none")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
        if template is None:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise DataError(f"tokenizer: expected a chat template named default, got {names}")
    if template is None:
        template = _leading_tokens(tokenizer) + _PLAIN
    return with_pauses_appended(template, pauses, tokens)


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
    """Write the template of `pause_chat_template` to a model folder.

    Beside a chat template of the model's own it becomes the one named "pause": `additional_chat_templates/pause.jinja`.
    A base model gets it as its only one, `chat_template.jinja`. The pause tokens are those that config.json names
    ("pause": {"tokens": [...]}), otherwise `<pause>`.

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
    folder, tokens = Path(folder), entry.get("tokens") or (PAUSE_TOKEN,)
    template, templates = pause_chat_template(tokenizer, pauses, tokens), templates_in(folder)
    if any(PAUSE_TOKEN in text for name, text in templates.items() if name != VARIANT):
        raise DataError(f"{folder}: expected no pauses, got a template that appends pauses already; remove it")
    if templates:
        return write_variant(folder, templates, pauses, tokens)
    path = folder / TEMPLATE
    path.write_text(template, encoding="utf-8")
    return path
