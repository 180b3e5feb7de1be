"""Texts of token ids, for placement policies that look at them: a table of the whole vocabulary, made once a process.

The text of a token is what it adds to a text, with its leading blank. It is "" for EOD, pauses and special tokens with
a role, and the replacement character for a part of a character.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pause_megatron.data.tokenizer.pause_tokenizer import PauseTokenizer, ids_end


class TokenTextTable:
    """The texts of all ids, decoded when the first one is asked for.

    Args:
        size: Number of ids.
        decode: Returns the text of ids.
        anchor: Ids of a text that is put before a token, since decoders strip the blank that a text begins with.
        silent: Ids whose text is "".
    """

    def __init__(
        self, size: int, decode: Callable[[list[int]], str], anchor: Sequence[int], silent: Sequence[int] = ()
    ) -> None:
        self._size, self._decode, self._anchor, self._silent = size, decode, list(anchor), frozenset(silent)
        self._lock = threading.Lock()
        self._texts: list[str] | None = None
        self._matches: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Without the lock, and without what is made on demand: `datasets` digests a transform by its pickle.
        return {**self.__dict__, "_lock": None, "_texts": None, "_matches": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, token: int) -> str:
        """Return the text of a token."""
        return self._all()[token]

    def matches(self, pattern: str) -> np.ndarray:
        """Return which tokens' texts contain a match of a regular expression.

        Args:
            pattern: The regular expression.

        Returns:
            One value for each id and a last one, False, for ids that are outside the table, bool [ids + 1].
        """
        found = self._matches.get(pattern)
        if found is None:
            search = re.compile(pattern).search
            found = np.array([*(text != "" and search(text) is not None for text in self._all()), False])
            self._matches[pattern] = found
        return found

    def _all(self) -> list[str]:
        with self._lock:  # threads that read batches ask at the same time
            if self._texts is None:
                before = len(self._decode(self._anchor))
                self._texts = [self._text(token, before) for token in range(self._size)]
            return self._texts

    def _text(self, token: int, before: int) -> str:
        if token in self._silent:
            return ""
        try:
            return self._decode([*self._anchor, token])[before:]
        except Exception:  # an id in a gap of the vocabulary: libraries raise many exceptions
            return ""


def token_texts(tokenizer: Any) -> TokenTextTable | None:
    """Return the texts of a tokenizer's ids, the same object for the same tokenizer.

    Args:
        tokenizer: A tokenizer of this project, of transformers, or of Megatron-LM
            (`detokenize`); or a PauseTokenizer.

    Returns:
        The table; None where the tokenizer cannot decode.
    """
    return _table(tokenizer.tokenizer if isinstance(tokenizer, PauseTokenizer) else tokenizer)


@lru_cache(maxsize=8)
def _table(tokenizer: Any) -> TokenTextTable | None:
    encode = getattr(tokenizer, "encode", None) or getattr(tokenizer, "tokenize", None)
    decode = getattr(tokenizer, "decode", None) or getattr(tokenizer, "detokenize", None)
    if not callable(decode):
        return None
    silent = [getattr(tokenizer, "eod", -1)]
    if (special := getattr(tokenizer, "all_special_ids", None)) is not None:  # a tokenizer of transformers
        silent += special
        silent += [token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special]
        decode = partial(decode, clean_up_tokenization_spaces=False)
    if isinstance(pause := getattr(tokenizer, "pause_id", None), int):
        silent.append(pause)
    # vocab_size of transformers leaves out added tokens, among which a tokenizer may have runs of blanks.
    size = max(int(tokenizer.vocab_size), ids_end(tokenizer))
    return TokenTextTable(size, decode, encode("a") if callable(encode) else [], silent)
