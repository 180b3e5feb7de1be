"""Encoding of texts that continue other text, with the same ids in training targets and in generated answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pause_megatron.errors import ConfigError, DataError

# A decoder strips the space before the first piece of a text; after this word a continuation keeps it.
_ANCHOR = "a"

# Prefixes that a continuation is encoded after; one of them does not merge with its first characters.
_BEFORE = (_ANCHOR, ".", "\n")


class Continuations:
    """An encoder and decoder of continuations, for any tokenizer.

    Args:
        encode: Function from text to ids, without BOS and EOS.
        decode: Function from ids to text, without special tokens and pauses.
    """

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._plain_encode, self._plain_decode = encode, decode
        self._heads = [(before, encode(before)) for before in _BEFORE]
        self._anchor = self._heads[0][1]
        self._anchor_length = len(decode(self._anchor))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that continues another one, as an answer after pauses does.

        A SentencePiece answer must start with a space-prefixed piece (`▁the` for " the", never `▁`, `▁the`), and a
        continuation inside a word must not. Encoding the text alone does not give that. So the text is encoded after a
        prefix, and the ids must decode to exactly this text.

        Raises:
            DataError: No prefix gives such ids.
        """
        for before, head in self._heads:
            whole = self._plain_encode(before + text)
            ids = whole[len(head) :]
            if whole[: len(head)] == head and self.decode(ids) == text:
                return ids
        raise DataError(f"continuation: expected a text whose ids decode to it, got {text!r}")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that ids add to the text before them."""
        return self._plain_decode([*self._anchor, *ids])[self._anchor_length :]

    def filler_id(self, text: str) -> int:
        """Return the id of a filler, an ordinary token in place of `<pause>`.

        Args:
            text: Text of the filler.

        Raises:
            ConfigError: The text is not a single token.
        """
        try:
            return self.one_token(text)
        except DataError as error:
            raise ConfigError(f"filler: {error}") from None

    def one_token(self, text: str) -> int:
        """Return the id of a text that is a single token.

        Args:
            text: The text.

        Raises:
            DataError: It is none, or several.
        """
        ids = self._plain_encode(text)
        if len(ids) == 2 and self.decode(ids[:1]) in ("", " "):
            ids = ids[1:]  # SentencePiece puts a bare space before a piece that has no space-prefixed form
        if len(ids) != 1:
            pieces = " ".join(repr(self.decode([token_id])) for token_id in ids)
            raise DataError(f"expected the text of one token, got {text!r}, which is {len(ids)} ({pieces})")
        return ids[0]
