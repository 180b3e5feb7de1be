"""Blends of corpora as Megatron-LM's --data-path writes them: WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from pause_megatron.errors import ConfigError

Blend = tuple[list[str], list[float] | None]
"""Prefixes, and their weights or None, as BlendedMegatronDatasetConfig takes them."""


def split_words(value: object) -> object:
    """Return prefixes and weights as a tuple of texts.

    Args:
        value: A text, which is split at blanks, or a list. Anything else is returned as it is.
    """
    if isinstance(value, str):
        return tuple(value.split())
    if isinstance(value, (list, tuple)):  # weights may be written as numbers
        return tuple(str(item) if type(item) in (int, float) else item for item in value)
    return value


def is_number(word: str) -> bool:
    """Return whether a word of a blend is a weight.

    Args:
        word: A weight or a prefix.
    """
    try:
        float(word)
    except ValueError:
        return False
    return True


def parse_blend(prefix: Sequence[str]) -> Blend:
    """Split a blend into prefixes and weights, as BlendedMegatronDatasetConfig takes them.

    Args:
        prefix: (WEIGHT, PREFIX, ...) or (PREFIX, ...).

    Raises:
        ConfigError: No prefix is given, only some prefixes have weights, or a weight is not positive.
    """
    if not prefix:
        raise ConfigError("data.prefix: expected the prefix of a prepared corpus, got nothing")
    weights = [_weight(word) for word in prefix[::2]]
    if len(prefix) % 2 or all(weight is None for weight in weights):
        return list(prefix), None
    valid = [weight for weight in weights if weight is not None and 0 < weight < float("inf")]
    if len(valid) < len(weights):
        raise ConfigError(
            f"data.prefix: expected WEIGHT PREFIX WEIGHT PREFIX ... with weights above 0, got {' '.join(prefix)!r}"
        )
    prefixes = list(prefix[1::2])
    # The weight of a single corpus has no effect.
    return prefixes, valid if len(prefixes) > 1 else None


def _weight(word: str) -> float | None:
    return float(word) if is_number(word) else None
