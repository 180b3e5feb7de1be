"""Keys of earlier versions and their present names.

`load` accepts an old name in a file and on the command line, with a warning; nothing else writes or lists one. A
`config.yaml` with an old name therefore loads, resumes and compares as the run that it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pause_megatron.config.text import Entry
from pause_megatron.errors import ConfigError


@dataclass(frozen=True)
class RenamedKey:
    """One key that had another name.

    Attributes:
        old: Dotted path in the earlier version.
        new: Dotted path now.
        values: Each value under the old name, as text, and what it is now.
    """

    old: str
    new: str
    values: Mapping[str, Any]

    def new_value(self, value: object, place: str) -> Any:
        """Translate a value.

        Args:
            value: Value of the old key.
            place: Where it was written, for the message.

        Raises:
            ConfigError: The old name never had this value.
        """
        if not isinstance(value, str) or value not in self.values:
            expected = ", ".join(f"{self.new}={_yaml(new)} (was {old})" for old, new in self.values.items())
            raise ConfigError(f"{place}: {self.old} is now {self.new}: expected {expected}; got {self.old}={value!r}")
        return self.values[value]

    def old_value(self, value: object) -> str:
        """Return the value of the old key that corresponds to `value` of the new one."""
        return next(old for old, new in self.values.items() if new == value)


_RENAMED = (
    # OLMo-core's term, and Megatron-LM's --reset-attention-mask with --reset-position-ids.
    RenamedKey("data.documents", "data.intra_document_masking", {"joined": False, "apart": True}),
)
BY_OLD_NAME = {key.old: key for key in _RENAMED}
_BY_NEW_NAME = {key.new: key for key in _RENAMED}


def with_new_names(entries: Iterable[Entry]) -> tuple[list[Entry], list[str]]:
    """Translate the entries of one source, a file or the command line.

    Args:
        entries: Keys as they were written.

    Returns:
        The entries under their present names, and one warning a renamed key.

    Raises:
        ConfigError: A key is given under both names, or an old name has a value that it never had.
    """
    entries = list(entries)
    places = {entry.path: entry.where for entry in entries}
    translated, warnings = [], []
    for entry in entries:
        key = BY_OLD_NAME.get(entry.path)
        if key is None:
            translated.append(entry)
            continue
        if key.new in places:
            raise ConfigError(
                f"{entry.where}: expected {key.new} or its old name {key.old}, got both ({key.new} at "
                f"{places[key.new]}). Remove {key.old}"
            )
        value = key.new_value(entry.value, entry.where)
        translated.append(Entry(key.new, value, _yaml(value), entry.where))
        warnings.append(
            f"{entry.where}: {key.old}={entry.value} is deprecated and will be refused from 0.2 on; write "
            f"{key.new}={_yaml(value)}"
        )
    return translated, warnings


def with_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys and values as they were spelled earlier, for digests that were stored under those names.

    Args:
        values: Values by the dotted path of their key.
    """
    spelled = {}
    for path, value in values.items():
        key = _BY_NEW_NAME.get(path)
        spelled[path if key is None else key.old] = value if key is None else key.old_value(value)
    return spelled


def stored_value(stored: Mapping[str, Mapping[str, Any]], path: str) -> Any:
    """Return the value of a key in a configuration that this or an earlier version stored as nested groups.

    Args:
        stored: Values by section and name.
        path: Present dotted path of the key.

    Returns:
        The value; None where neither name is there.
    """
    section, _, name = path.partition(".")
    key = _BY_NEW_NAME.get(path)
    if key is not None and name not in stored.get(section, {}):
        section, _, name = key.old.partition(".")
        value = stored.get(section, {}).get(name)
        return key.values[value] if isinstance(value, str) and value in key.values else value
    return stored.get(section, {}).get(name)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
