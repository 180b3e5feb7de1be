"""Blends as Megatron-LM's --data-path writes them: WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes alone."""

from __future__ import annotations

from collections.abc import Sequence

from pause_megatron.errors import ConfigError

Blend = tuple[list[str], list[float] | None]
"""Prefixes, and their weights or None: what BlendedMegatronDatasetConfig takes."""


def split_words(value: object) -> object:
    """Prefixes and their weights as a tuple of texts: a text is split at blanks, a list stays as it is."""
    if isinstance(value, str):
        return tuple(value.split())
    if isinstance(value, (list, tuple)):  # the weights of a blend may be written as numbers
        return tuple(str(item) if type(item) in (int, float) else item for item in value)
    return value


def is_number(word: str) -> bool:
    """Whether a word of a blend is a weight."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def parse_blend(prefix: Sequence[str]) -> Blend:
    """(WEIGHT, PREFIX, ...) or (PREFIX, ...) -> prefixes and their weights, as BlendedMegatronDatasetConfig wants them.

    Raises:
        ConfigError: nothing given, weights for some prefixes only, or a weight that is not positive.
    """
    if not prefix:
        raise ConfigError("data.prefix: expected the prefix of a prepared corpus, got nothing")
    weights = [_weight(word) for word in prefix[::2]]
    if len(prefix) % 2 or all(weight is None for weight in weights):
        return list(prefix), None
    if any(weight is None or not 0 < weight < float("inf") for weight in weights):
        raise ConfigError(
            f"data.prefix: expected WEIGHT PREFIX WEIGHT PREFIX ... with weights above 0, got {' '.join(prefix)!r}"
        )
    prefixes = list(prefix[1::2])
    # One corpus needs no blending, whatever its weight.
    return prefixes, weights if len(prefixes) > 1 else None


def _weight(word: str) -> float | None:
    return float(word) if is_number(word) else None
