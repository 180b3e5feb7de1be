"""Values of a config.json by key, checked, and keys that may change what a model computes without being supported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pause_megatron.errors import CheckpointError

_COMPUTES = re.compile(
    r"scal|multiplier|softcap|cap_|clip|expert|moe|rope|rotary|alibi|norm|bias|sliding|window|interleav|parallel_resid|"
    r"layer_config|sparse|mtp|nextn|lora|sink|mup|_mult|head_dim|chunk|cross_attention|cla_|share"
)
"""Parts of the names of keys by which other models, or forks of these, change the computation."""

_HARMLESS = re.compile(r"^_|^(unsloth|transformers|torch|rope_theta$|rope_scaling$)|chunk_size_feed_forward")
_NEUTRAL: tuple[object, ...] = (None, 0, 1, "", [], {})


class ConfigKeys:
    """Keys of one config.json. A missing key has the default of transformers.

    Args:
        config: Content of the file.
        defaults: Values of missing keys.
        where: Names the file in messages.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self._config = {**defaults, **config}
        self._assumed = defaults.keys() - config.keys()
        self._where = where

    def __contains__(self, key: str) -> bool:
        return key in self._config

    def names(self) -> tuple[str, ...]:
        """Return the names of all keys."""
        return tuple(self._config)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it is in the file."""
        return self._config.get(key, default)

    def group(self, key: str) -> ConfigKeys:
        """Return the keys of a group within the file; none if it is missing or null."""
        record = self._config.get(key) or {}
        if not isinstance(record, Mapping):
            raise self.wrong(key, "a group of keys, or null", record)
        return ConfigKeys(record, {}, f"{self._where}: {key}")

    def expect(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> None:
        """Check that a value is one of those allowed."""
        if (value := self._config.get(key, default)) not in allowed:
            raise self.wrong(key, " or ".join(map(repr, allowed)), value)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0."""
        value = self._config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(key, "a whole number above 0 and below 2**31", value)
        return value

    def number(self, key: str, default: float | None = None, least: float = 0.0) -> float:
        """Return a number above 0, at least `least`."""
        value: Any = self._config.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not (0 < value < float("inf") and value >= least):
            raise self.wrong(key, f"a number of at least {least:g}" if least else "a number above 0", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false; a missing key is false."""
        value = self._config.get(key, False)
        if type(value) is not bool:
            raise self.wrong(key, "true or false", value)
        return value

    def wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        """Return the error of a value."""
        got = f"{str(value)[:200]!r}" if key in self._config else "no such key"
        assumed = ", the default of transformers for a missing key" if key in self._assumed else ""
        return CheckpointError(f"{self._where}: {key}: expected {expected}, got {got}{assumed}")

    def refuse_unknown(self, known: frozenset[str], title: str) -> None:
        """Refuse keys that transformers does not read for this class, but that change what other models compute.

        Args:
            known: Keys that are read, by this package or by one of the classes of transformers.
            title: Name of the class.
        """
        for key, value in self._config.items():
            name = str(key)
            if name in known or _HARMLESS.search(name) or not _COMPUTES.search(name.lower()):
                continue
            if value is True or not any(value == neutral for neutral in _NEUTRAL):
                reason = f"{title} of transformers does not read it; if it changes nothing, remove it"
                raise self.wrong(name, f"no such key ({reason})", value)
