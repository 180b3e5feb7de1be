"""Pauses within an answer: after every n-th token, after tokens of a pattern, while entropy is high, or on request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from pause_megatron.errors import ConfigError, DataError

_LIMIT = 10
_UNLIMITED = "decoding.limit: expected decoding.entropy or decoding.requests with it, got neither"


@dataclass(frozen=True, kw_only=True)
class DecodingPauses:
    """Where an answer gets pauses, besides those after the prompt. Without a mode (the default) it gets none.

    Two modes put pauses at places that the text alone decides. They are computed in the pass of the token before them:

    - `every`: `count` pauses after each n-th token of the answer.
    - `after`: `count` pauses after each token whose text matches. A token that both modes name gets `count` once.

    Two modes grant pauses before a token, on what the model predicts there, at most `limit` before each token. Each
    takes a pass. Pauses of the places do not count towards the limit.

    - `entropy`: while the next token's distribution, pauses excluded, has more entropy than this, `count` pauses.
    - `requests`: if the selected token is the (first) pause id, one pause, and the token is selected again. The request
      is never shown. After `limit` pauses the pause id takes no part in the softmax.

    Attributes:
        every: n; None for never.
        after: Regular expression that the text of a token, with its leading blank, must contain; None for never.
        entropy: Threshold in nats, at temperature 1; None for never.
        requests: Whether the model may request pauses.
        count: Pauses at each place, and of each block of `entropy`.
        limit: Maximum number of pauses that are granted before one token.
        in_prompt: Whether places of the prompt get pauses too, within the prefill. `every` then counts from the
            prompt's first token.

    Raises:
        ConfigError: A value out of its range, or an option without the mode that it belongs to.
    """

    every: int | None = None
    after: str | None = None
    entropy: float | None = None
    requests: bool = False
    count: int = 1
    limit: int = _LIMIT
    in_prompt: bool = False

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("count", self.count), ("limit", self.limit)):
            if value is not None and (not _is_int(value) or value < 1):
                raise ConfigError(f"decoding.{name}: expected 1 or more, got {value!r}")
        for name, flag in (("requests", self.requests), ("in_prompt", self.in_prompt)):
            if not isinstance(flag, bool):
                raise ConfigError(f"decoding.{name}: expected true or false, got {flag!r}")
        if self.entropy is not None and not (_is_number(self.entropy) and 0 <= self.entropy < float("inf")):
            raise ConfigError(f"decoding.entropy: expected 0 nats or more, got {self.entropy!r}")
        if self.after is not None:
            _compile(self.after)
        if self.in_prompt and not self.placed:
            raise ConfigError("decoding.in_prompt: expected decoding.every or decoding.after with it, got neither")
        if self.count != 1 and not self.placed and self.entropy is None:
            modes = "decoding.every, decoding.after or decoding.entropy"
            raise ConfigError(f"decoding.count: expected {modes} with it, got none of them")
        if self.limit != _LIMIT and not self.granted:
            raise ConfigError(_UNLIMITED)

    @property
    def placed(self) -> bool:
        """Whether the text decides places: `every` or `after`."""
        return self.every is not None or self.after is not None

    @property
    def words(self) -> str:
        """Where pauses stand, in words; "" for nowhere."""
        count, found = "a pause" if self.count == 1 else f"{self.count} pauses", []
        if self.every is not None:
            found.append(f"{count} after every {'token' if self.every == 1 else f'{self.every} tokens'}")
        if self.after is not None:
            found.append(f"{count} after each token that contains {self.after!r}")
        if self.in_prompt:
            found.append("in prompts too")
        if self.entropy is not None:
            found.append(f"{count} at a time above {self.entropy:g} nats, up to {self.limit} before a token")
        if self.requests:
            found.append(f"on the model's request, up to {self.limit} before a token")
        return "; ".join(found)

    @property
    def granted(self) -> bool:
        """Whether predictions decide: `entropy` or `requests`."""
        return self.entropy is not None or self.requests

    @property
    def active(self) -> bool:
        """Whether there is any mode."""
        return self.placed or self.granted

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """`after`, compiled."""
        return None if self.after is None else _compile(self.after)

    def document(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as plain JSON."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    @classmethod
    def parse(cls, document: Any, where: str) -> DecodingPauses:
        """Return the pauses that a JSON object describes.

        Args:
            document: Fields by name.
            where: File and key, for messages.

        Raises:
            DataError: Not an object, an unknown field, or a value out of its range.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(document, Mapping):
            raise DataError(f"{where}: expected an object with some of {', '.join(names)}, got {document!r}")
        if unknown := [name for name in document if name not in names]:
            raise DataError(f"{where}: expected some of {', '.join(names)}, got {unknown[0]!r}")
        try:
            return cls(**document)
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from None

    def override(
        self,
        *,
        every: int | None = None,
        after: str | None = None,
        entropy: float | None = None,
        requests: bool | None = None,
        count: int | None = None,
        limit: int | None = None,
        in_prompt: bool | None = None,
    ) -> DecodingPauses:
        """Return these pauses with other values where some are given.

        Args:
            every: n; 0 for never; None for the value here, as for the others.
            after: A regular expression; "" for never.
            entropy: A threshold; infinity for never.
            requests: Whether the model may request pauses.
            count: Pauses at each place.
            limit: Maximum number of granted pauses before one token.
            in_prompt: Whether places of the prompt get pauses too.

        Raises:
            ConfigError: As for the class, or a limit where nothing is granted.
        """
        every = self.every if every is None else every or None
        after = self.after if after is None else after or None
        entropy = self.entropy if entropy is None else None if entropy == float("inf") else entropy
        requests = self.requests if requests is None else requests
        placed = every is not None or after is not None
        granted = entropy is not None or requests
        if limit is not None and not granted:
            raise ConfigError(_UNLIMITED)
        if in_prompt is None:
            in_prompt = self.in_prompt and placed
        if count is None:
            count = self.count if placed or entropy is not None else 1
        if limit is None:
            limit = self.limit if granted else _LIMIT
        return replace(
            self,
            every=every,
            after=after,
            entropy=entropy,
            requests=requests,
            count=count,
            limit=limit,
            in_prompt=in_prompt,
        )


def _compile(pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"decoding.after: expected a regular expression, not empty, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"decoding.after: expected a regular expression, got {pattern!r} ({error})") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


NO_DECODING_PAUSES = DecodingPauses()
