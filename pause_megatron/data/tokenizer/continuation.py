"""Texts that go on from other text: the ids of a target at training are those of an answer at inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pause_megatron.errors import ConfigError, DataError

# A decoder strips the space before the first piece of a text; behind this word a continuation keeps it.
_ANCHOR = "a"

# Texts that a continuation is encoded behind; one of them will not merge with its first characters.
_BEFORE = (_ANCHOR, ".", "\n")


class Continuations:
    """Continuations to ids and back, around any tokenizer.

    Args:
        encode: text -> ids, without anything that the tokenizer puts around texts.
        decode: ids -> text; special tokens, pauses among them, are not shown.
    """

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._plain_encode, self._plain_decode = encode, decode
        self._heads = [(before, encode(before)) for before in _BEFORE]
        self._anchor = self._heads[0][1]
        self._anchor_length = len(decode(self._anchor))

    def encode(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one, as an answer after pauses does.

        A SentencePiece answer must start with a space-prefixed piece (`▁the` for " the", never `▁`, `▁the`), and the
        middle of a word must not, which encoding the text on its own does not give. So it is encoded behind other text,
        and what comes out must decode to exactly this text.

        Raises:
            DataError: none does.
        """
        for before, head in self._heads:
            whole = self._plain_encode(before + text)
            ids = whole[len(head) :]
            if whole[: len(head)] == head and self.decode(ids) == text:
                return ids
        raise DataError(f"{text!r} has no encoding as a continuation that decodes to itself")

    def decode(self, ids: Sequence[int]) -> str:
        """Text that ids add to the text before them."""
        return self._plain_decode([*self._anchor, *ids])[self._anchor_length :]

    def filler_id(self, text: str) -> int:
        """The one token that a filler (an ordinary token in place of `<pause>`) is.

        Raises:
            ConfigError: it is several tokens, or none.
        """
        ids = self._plain_encode(text)
        if len(ids) == 2 and self.decode(ids[:1]) in ("", " "):
            ids = ids[1:]  # SentencePiece puts a bare space before a piece that has no space-prefixed form
        if len(ids) != 1:
            pieces = " ".join(repr(self.decode([token_id])) for token_id in ids)
            raise ConfigError(f"filler: expected the text of one token, {text!r} is {len(ids)} ({pieces})")
        return ids[0]
