"""Opening of Hugging Face datasets as streams, with errors that name the option to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pause_megatron.errors import DataError

HUB_PREFIX = "hf:"


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """The part of a Hugging Face dataset to read.

    Attributes:
        config: Name of the configuration, such as "en"; None for the default.
        split: Name of the split.
        revision: Branch, tag or commit of the repository; None for the default branch.
        data_files: Files for a generic loader such as "json".
    """

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()

    @property
    def files_by_split(self) -> dict[str, list[str]] | None:
        """`data_files` in the form that `datasets` takes."""
        return {self.split: list(self.data_files)} if self.data_files else None


@dataclass(frozen=True)
class OptionNames:
    """Spellings of the options in error messages: of the command line, or of the configuration file.

    Attributes:
        source: Prefix of the dataset's name, such as "--input ".
        config: Option of the configuration's name.
        split: Option of the split's name.
        text_key: Option of the text column's name.
    """

    source: str
    config: str
    split: str
    text_key: str


def open_hub(dataset: str, options: HubOptions, text_key: str, names: OptionNames) -> tuple[Any, Any]:
    """Open a split of a dataset as a stream, downloading only its metadata.

    Args:
        dataset: Name of a dataset on the Hub, a folder, or a loader.
        options: The part of the dataset to read.
        text_key: Column of the text; checked where the dataset declares its columns.
        names: Spellings of the options, for errors.

    Returns:
        The `datasets` builder of the dataset, and the `IterableDataset` of the split.

    Raises:
        DataError: No such dataset, configuration, split or column.
    """
    from datasets import load_dataset_builder

    what = HUB_PREFIX + dataset
    try:
        builder = load_dataset_builder(
            dataset, options.config, revision=options.revision, data_files=options.files_by_split
        )
    except Exception as error:  # each loader raises its own format library's exceptions
        configs = _configs(dataset, options)
        if configs and options.config not in configs:
            got = "nothing" if options.config is None else repr(options.config)
            raise DataError(f"{names.config}: expected {_one_of(configs)} ({what}), got {got}") from error
        raise _cannot_open(what, names, error) from error
    try:
        streams = builder.as_streaming_dataset()
        stream = streams.get(options.split)
        columns = None if stream is None else stream.column_names
    except Exception as error:
        raise _cannot_open(what, names, error) from error
    if stream is None:
        raise DataError(f"{names.split}: expected {_one_of(list(streams))} ({what}), got {options.split!r}")
    if columns is not None and text_key not in columns:
        raise DataError(
            f"{names.source}{what}: expected a text column among {', '.join(columns)}, got {text_key!r} "
            f"({names.text_key})"
        )
    return builder, stream


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _cannot_open(what: str, names: OptionNames, error: Exception) -> DataError:
    return DataError(
        f"{names.source}{what}: datasets cannot open it ({first_line(error)}); expected a dataset of the Hugging Face "
        "Hub, a folder, or a loader such as hf:json with files"
    )


def _configs(dataset: str, options: HubOptions) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return get_dataset_config_names(dataset, revision=options.revision, data_files=options.files_by_split)
    except Exception:  # no such dataset, or the Hub is unreachable: the caller reports the first error
        return []


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else ", ".join(names)
