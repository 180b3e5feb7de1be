"""Opening a data set through `datasets`, with errors that name the option at fault and what there is instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pause_megatron.errors import DataError

HUB_PREFIX = "hf:"


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Which part of a `datasets` data set is read. `data_files` serves loaders such as 'json'."""

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()

    @property
    def files_by_split(self) -> dict[str, list[str]] | None:
        """`data_files` as `datasets` wants them."""
        return {self.split: list(self.data_files)} if self.data_files else None


@dataclass(frozen=True)
class OptionNames:
    """What the options are called where the user gave them; a value follows directly."""

    source: str
    config: str
    split: str
    text_key: str


def open_hub(dataset: str, options: HubOptions, text_key: str, names: OptionNames) -> tuple[Any, Any]:
    """The builder of a data set and the stream of its split. Nothing is downloaded but what says what is there.

    Args:
        dataset: of the Hub, a folder, or a loader.
        options: which part.
        text_key: column that must be there, where the data set says its columns beforehand.
        names: of the options, for errors.

    Raises:
        DataError: no such data set, configuration, split or column.
    """
    from datasets import load_dataset_builder

    what = HUB_PREFIX + dataset
    try:
        builder = load_dataset_builder(
            dataset, options.config, revision=options.revision, data_files=options.files_by_split
        )
    except Exception as error:  # loaders raise whatever their format's library raises
        configs = _configs(dataset, options)
        if configs and options.config not in configs:
            came = "nothing" if options.config is None else repr(options.config)
            raise DataError(f"{names.config}: expected {_one_of(configs)}, which {what} has; came {came}") from error
        raise _cannot_open(what, names, error) from error
    try:
        streams = builder.as_streaming_dataset()
        stream = streams.get(options.split)
        columns = None if stream is None else stream.column_names
    except Exception as error:
        raise _cannot_open(what, names, error) from error
    if stream is None:
        raise DataError(f"{names.split}: expected {_one_of(streams)}, which {what} has; came {options.split!r}")
    if columns is not None and text_key not in columns:
        raise DataError(
            f"{names.source}{what}: no column {text_key!r}; its columns are {', '.join(columns)} ({names.text_key})"
        )
    return builder, stream


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _cannot_open(what: str, names: OptionNames, error: Exception) -> DataError:
    return DataError(
        f"{names.source}{what}: datasets cannot open it ({first_line(error)}); expected a data set of the Hugging Face "
        "Hub, a folder, or a loader such as hf:json with files"
    )


def _configs(dataset: str, options: HubOptions) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return get_dataset_config_names(dataset, revision=options.revision, data_files=options.files_by_split)
    except Exception:  # there is no such data set, or the Hub cannot be reached: the first error says it
        return []


def _one_of(names) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else ", ".join(names)
