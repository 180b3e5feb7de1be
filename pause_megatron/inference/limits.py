"""Stopping criteria of an answer: its length, stop texts and the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pause_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where an answer ends.

    Attributes:
        max_new_tokens: Maximum length, in tokens.
        stop: Texts that end an answer; they are not part of it.
        ignore_eos: Continue after an end-of-sequence token, which is then never emitted.

    Raises:
        ConfigError: A value out of its range.
    """

    max_new_tokens: int = 64
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")
        if isinstance(self.stop, str) or any(not text for text in self.stop):
            raise ConfigError(f"stop: expected a list of texts, none of them empty, got {self.stop!r}")


DEFAULT_LIMITS = Limits()
