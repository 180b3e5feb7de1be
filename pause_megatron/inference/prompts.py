"""Prompts as token ids with their pauses, and answers as text without them.

Pauses are token ids, never text: a prompt that spells `<pause>` (or any other special token) is encoded as the
characters it is made of, and no pause is ever shown in what comes back. method.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pause_megatron.data.tokenizer.continuation import Continuations
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN, ids_before
from pause_megatron.data.windows.pause import LOCATIONS, add_pauses
from pause_megatron.errors import DataError

PREFIX_ATTENTIONS = ("causal", "bidirectional")


@dataclass(frozen=True)
class PauseInfo:
    """What a model knows about pauses: the "pause" entry of an export's config.json.

    Attributes:
        ids: the K pause ids, used in turn within a run; empty for a model without pauses.
        m_ft: pauses that the model was finetuned with; None if it was not, or if nobody said so.
        prefix_attention: "causal" or "bidirectional" (a prefix-LM).
        location: "append" or "prepend": where it was finetuned to have them.
        filler: text of the ordinary token that it was finetuned with in their place; None: pauses.
    """

    ids: range = range(0)
    m_ft: int | None = None
    prefix_attention: str = "causal"
    location: str = "append"
    filler: str | None = None

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> PauseInfo:
        """Read it from a model's configuration; without a "pause" entry, from the tokenizer's `<pause>` alone.

        Args:
            config: the model's `PretrainedConfig`.
            tokenizer: its tokenizer.

        Raises:
            DataError: the entry is malformed, names ids the model has no rows for, or differs from the tokenizer.
        """
        token_id = _special_id(tokenizer, PAUSE_TOKEN)
        entry = getattr(config, "pause", None)
        if entry is None:
            known = token_id is not None and token_id < config.vocab_size
            return cls(range(token_id, token_id + 1)) if known else cls()
        info = cls._parse(entry)
        if info.ids and info.ids.stop > config.vocab_size:
            raise DataError(f"config.json: pause.ids reach {info.ids.stop - 1}, vocab_size is {config.vocab_size}")
        if info.ids and token_id is not None and token_id != info.ids.start:
            raise DataError(
                f"config.json: pause.ids begin with {info.ids.start}, but the tokenizer's {PAUSE_TOKEN} is {token_id}"
            )
        return info

    @classmethod
    def _parse(cls, entry: Any) -> PauseInfo:
        try:
            ids = [int(token_id) for token_id in entry["ids"]]
            m_ft = entry.get("m_ft")
            info = cls(
                range(ids[0], ids[0] + len(ids)) if ids else range(0),
                None if m_ft is None else int(m_ft),
                entry.get("prefix_attention", "causal"),
                entry.get("location", "append"),
                entry.get("filler"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f'config.json: "pause" is not readable ({type(error).__name__}: {error})') from None
        if list(info.ids) != ids or info.ids.start < 0:
            raise DataError(f"config.json: pause.ids: expected consecutive ids, came {ids}")
        if info.m_ft is not None and info.m_ft < 0:
            raise DataError(f"config.json: pause.m_ft: expected null or 0 or more, came {info.m_ft}")
        for name, allowed in (("prefix_attention", PREFIX_ATTENTIONS), ("location", LOCATIONS)):
            if getattr(info, name) not in allowed:
                raise DataError(
                    f"config.json: pause.{name}: expected one of {', '.join(allowed)}, came {getattr(info, name)!r}"
                )
        if info.filler is not None and not (isinstance(info.filler, str) and info.filler):
            raise DataError(f"config.json: pause.filler: expected null or the text of a token, came {info.filler!r}")
        return info


class PromptEncoder:
    """Text to ids and back, around a Hugging Face tokenizer.

    Args:
        tokenizer: a fast (Rust) tokenizer of the model.
        pause: the model's pauses.
    """

    def __init__(self, tokenizer: Any, pause: PauseInfo) -> None:
        self.tokenizer = tokenizer
        self.pause = pause
        self._continuations = Continuations(self._encode, self._decode)
        self.leading = self._leading()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt: what the tokenizer puts before a text (a BOS, if it does), then the text itself.

        Ids are taken as they are (the output of `apply_chat_template`, say). Text never becomes a special token.
        """
        if not isinstance(prompt, str):
            return [int(token_id) for token_id in prompt]
        return self.leading + self._encode(prompt)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one, as an answer after pauses does.

        Raises:
            DataError: it has no encoding that decodes to exactly this text.
        """
        return self._continuations.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Text that ids add to the text before them. Special tokens, pauses among them, are not shown."""
        return self._continuations.decode(ids)

    def with_pauses(self, ids: Sequence[int], count: int, location: str, filler: Sequence[int] = ()) -> list[int]:
        """A prompt and its pauses.

        Args:
            ids: the prompt, [tokens].
            count: M.
            location: "append": after the prompt. "prepend": before it, but after a leading BOS.
            filler: an ordinary token to use in place of `<pause>`; empty: the model's pause ids.

        Returns:
            ids, [tokens + M].
        """
        pause_ids = range(filler[0], filler[0] + 1) if filler else self.pause.ids
        kept = len(self.leading) if list(ids[: len(self.leading)]) == self.leading else 0
        text = np.array(ids, dtype=np.int64)
        return add_pauses(text, count, pause_ids, location=location, kept=kept).tolist()

    def filler_id(self, text: str) -> int:
        """The one token that a filler is.

        Raises:
            ConfigError: it is several tokens, or none.
        """
        return self._continuations.filler_id(text)

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except (TypeError, UnicodeError) as error:
            raise DataError(f"prompt cannot be encoded: {error}") from None

    def _decode(self, ids: Sequence[int]) -> str:
        shown = [token_id for token_id in ids if token_id not in self.pause.ids]
        return self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _leading(self) -> list[int]:
        """What the tokenizer puts before a text. What it puts after one (an EOS) would end the prompt: left out."""
        whole = self.tokenizer("a", add_special_tokens=True, split_special_tokens=True)["input_ids"]
        return ids_before(whole, self._encode("a"))


def _special_id(tokenizer: Any, token: str) -> int | None:
    """Id of a special token that the tokenizer has by this name; None if it has none."""
    token_id = tokenizer.get_vocab().get(token)
    return token_id if token_id in tokenizer.all_special_ids or _is_added_special(tokenizer, token_id) else None


def _is_added_special(tokenizer: Any, token_id: int | None) -> bool:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is not None and added.special
