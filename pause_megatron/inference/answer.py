"""Incremental detokenization of one answer: text is emitted once it is certain, and cut at a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from pause_megatron.inference.limits import Limits
from pause_megatron.inference.prompts import PromptEncoder

# Decoders show bytes that are not yet a complete character as this one.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Answer:
    """New tokens of one row and their text.

    Args:
        encoder: Decodes token ids.
        eos: Ids of the end-of-sequence tokens that end the answer.
        limits: Other criteria that end it.

    Attributes:
        ids: Token ids so far, without the end-of-sequence token.
        text: Text emitted so far: the pieces that `push` returned, joined.
        finish: Why the answer ended: "eos", "stop" or "length"; "" while it continues.
    """

    def __init__(self, encoder: PromptEncoder, eos: Sequence[int], limits: Limits) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish = ""
        self._encoder = encoder
        self._eos = frozenset(eos)
        self._limits = limits

    def push(self, token_id: int) -> str:
        """Add the next token.

        Args:
            token_id: Its id.

        Returns:
            Text that is certain now; "" if there is none.
        """
        if token_id in self._eos:
            self.finish = "eos"
            return self._emit(self._decode())
        self.ids.append(token_id)
        text = self._decode()
        end = self._stop_at(text)
        if end is not None:
            self.finish = "stop"
            return self._emit(text[:end])
        if len(self.ids) >= self._limits.max_new_tokens:
            self.finish = "length"
            return self._emit(text)
        return self._emit(text[: len(text) - self._uncertain(text)])

    def _decode(self) -> str:
        return self._encoder.decode_continuation(self.ids)

    def _emit(self, text: str) -> str:
        """Return what lies past the text that was emitted before."""
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _stop_at(self, text: str) -> int | None:
        """Offset of the first stop text; None if there is none."""
        offsets = [offset for offset in map(text.find, self._limits.stop) if offset >= 0]
        return min(offsets, default=None)

    def _uncertain(self, text: str) -> int:
        """Return the number of final characters that may change: part of a character, or the start of a stop text."""
        incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
        starts = [
            length
            for stop in self._limits.stop
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ]
        return max([incomplete, *starts])
