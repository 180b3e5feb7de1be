"""An answer as it grows: ids in, text out as soon as it is certain, cut at a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from pause_megatron.inference.prompts import PromptEncoder

# Decoders show bytes that are not yet a character as this one.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Answer:
    """One row's new tokens and their text.

    Attributes:
        ids: tokens so far, the end-of-sequence token not among them.
        text: the text that was given out so far; the pieces that `push` and `close` return, joined.
        finish: why it ended: "eos", "stop" or "length"; "" while it goes on.
    """

    def __init__(self, encoder: PromptEncoder, eos: Sequence[int], stop: Sequence[str], limit: int) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish = ""
        self._encoder = encoder
        self._eos = frozenset(eos)
        self._stop = tuple(stop)
        self._limit = limit

    def push(self, token_id: int) -> str:
        """Take the next token. Returns the text that is certain now ("" if none is)."""
        if token_id in self._eos:
            self.finish = "eos"
            return self._give(self._decode())
        self.ids.append(token_id)
        text = self._decode()
        end = self._stop_at(text)
        if end is not None:
            self.finish = "stop"
            return self._give(text[:end])
        if len(self.ids) >= self._limit:
            self.finish = "length"
            return self._give(text)
        return self._give(text[: len(text) - self._held(text)])

    def _decode(self) -> str:
        return self._encoder.decode_continuation(self.ids)

    def _give(self, text: str) -> str:
        """Give out what lies past the text already given."""
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _stop_at(self, text: str) -> int | None:
        """Where the first stop text begins; None if there is none."""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return min(found, default=None)

    def _held(self, text: str) -> int:
        """Characters at the end that later tokens may still change: half a character, or the start of a stop text."""
        unfinished = len(text) - len(text.rstrip(_UNFINISHED))
        starts = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ]
        return max([unfinished, *starts])
