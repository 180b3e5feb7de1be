"""Endless readers of documents with a resumable state: JSON-lines shards on disk, or a streamed Hugging Face dataset.

After the last document the first one follows again, as a new epoch. Malformed records are skipped and counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pause_megatron.config.schema import DataSection
from pause_megatron.data.text.documents import Malformed, Tally, parse_record
from pause_megatron.data.text.hub import HUB_PREFIX, HubOptions, OptionNames, first_line, open_hub
from pause_megatron.data.text.sources import ReadOptions, find_sources
from pause_megatron.errors import DataError

MALFORMED_IN_A_ROW = 10_000
"""Malformed records in a row after which reading stops: a wrong text key would else read terabytes in vain."""

_NAMES = OptionNames("data.source=", "data.source_config", "data.source_split", "data.text_key")

ReaderState = dict[str, Any]
"""The state of a reader between two documents: JSON values. `datasets` defines the part of a Hugging Face dataset."""


class Documents(Protocol):
    """An endless reader of documents."""

    @property
    def name(self) -> str:
        """Name of the shard or dataset that is being read."""
        ...

    @property
    def malformed(self) -> Tally:
        """Counts of the records that were skipped since the reader was opened."""
        ...

    def take(self, count: int) -> list[str]:
        """Return the next documents: `count`, or fewer at the end of an epoch.

        Args:
            count: Number of documents, 1 or more.

        Returns:
            At least one document.

        Raises:
            DataError: The source cannot be read or holds no documents.
        """
        ...

    def state(self) -> ReaderState:
        """Return the state from which a new reader continues with the next document."""
        ...


class ShardDocuments:
    """Documents of JSON-lines shards, in natural order of their names.

    Resuming reads the current shard again up to the line of the state.

    Args:
        inputs: Paths or globs of shards.
        text_key: Key of the text in a record.
        state: The state to resume from. None: begin at the first document.

    Raises:
        DataError: There are no such shards.
    """

    def __init__(self, inputs: Sequence[str], text_key: str, state: ReaderState | None) -> None:
        self._options = ReadOptions(text_key=text_key)
        self._sources = find_sources(inputs, text_key=text_key)
        self.malformed = Tally()
        self._state = dict(state or {"epoch": 0, "shard": 0, "line": 0})
        self._records = self._epochs()

    @property
    def name(self) -> str:
        """Name of the shard that is being read."""
        return self._sources[self._state["shard"]].name

    def take(self, count: int) -> list[str]:
        """Return the next documents: `count`, or fewer at the end of an epoch."""
        return _take(self, self._records, count)

    def state(self) -> ReaderState:
        """Return epoch, shard and line of the next document."""
        return dict(self._state)

    def _epochs(self) -> Iterator[str | Malformed | None]:
        """Yield the records of all epochs, and None at the end of each."""
        while True:
            for number in range(self._state["shard"], len(self._sources)):
                documents = self._sources[number].open(self._options).documents()
                for document in itertools.islice(documents, self._state["line"], None):
                    self._state["line"] += 1
                    yield document
                self._state.update(shard=number + 1, line=0)
            self._state.update(epoch=self._state["epoch"] + 1, shard=0, line=0)
            yield None


class HubDocuments:
    """Documents of a Hugging Face dataset in streaming mode, resumed by its `state_dict`.

    Args:
        dataset: Name on the Hub, a folder, or a loader such as "json".
        options: The part of the dataset to read.
        text_key: Column of the text.
        state: The state to resume from. None: begin at the first document.

    Raises:
        DataError: There is no such dataset, configuration, split or column.
    """

    def __init__(self, dataset: str, options: HubOptions, text_key: str, state: ReaderState | None) -> None:
        self.name, self._dataset = HUB_PREFIX + dataset, dataset
        self._options, self._text_key = options, text_key
        self.malformed = Tally()
        self._epoch = 0 if state is None else state["epoch"]
        self._stream = self._open()
        # The state that was loaded into the stream: `datasets` returns none of its own before the first record.
        self._loaded = None if state is None else state["datasets"]
        self._has_read = False
        if self._loaded is not None:
            self._stream.load_state_dict(self._loaded)
        self._records = self._epochs()

    def take(self, count: int) -> list[str]:
        """Return the next documents: `count`, or fewer at the end of an epoch."""
        return _take(self, self._records, count)

    def state(self) -> ReaderState:
        """Return the epoch, and the state of `datasets` within it."""
        return {"epoch": self._epoch, "datasets": self._stream.state_dict() if self._has_read else self._loaded}

    def _open(self) -> Any:
        """Return a `datasets.IterableDataset` at its beginning."""
        return open_hub(self._dataset, self._options, self._text_key, _NAMES)[1]

    def _epochs(self) -> Iterator[str | Malformed | None]:
        """Yield the records of all epochs, and None at the end of each."""
        number = 0
        while True:
            try:
                for record in self._stream:
                    self._has_read = True
                    number += 1
                    yield parse_record(record, number, self._text_key)
            except Exception as error:
                raise DataError(
                    f"data.source={self.name}: expected a record after record {number:,}, got an error of datasets: "
                    f"{first_line(error)}. The same command resumes from the last checkpoint"
                ) from error
            # A new epoch needs a new object: one with a loaded state would begin at that state again.
            self._epoch, self._loaded, self._has_read = self._epoch + 1, None, False
            self._stream = self._open()
            yield None


def _take(reader: Documents, records: Iterator[str | Malformed | None], count: int) -> list[str]:
    """Return `count` documents, or fewer at the end of an epoch (None), but at least one."""
    documents: list[str] = []
    epochs = malformed = 0
    while len(documents) < count:
        record = next(records)
        if record is None:
            epochs += 1
            if documents:
                break
            if epochs > 1:
                raise _no_documents(reader, "the source holds no documents")
        elif isinstance(record, Malformed):
            reader.malformed.add(reader.name, record)
            malformed += 1
            if malformed >= MALFORMED_IN_A_ROW and not documents:
                raise _no_documents(reader, f"{malformed:,} records one after another hold no document")
        else:
            documents.append(record)
    return documents


def _no_documents(reader: Documents, reason: str) -> DataError:
    return DataError(
        f"data.source: expected documents, got none: {reason}. data.text_key names the key of the text\n"
        f"{reader.malformed.describe()}"
    )


def open_documents(data: DataSection, state: ReaderState | None = None) -> Documents:
    """Open the reader of `data.source`.

    Args:
        data: The data section of the configuration, with a source.
        state: The state to resume from. None: begin at the first document.

    Returns:
        The reader.

    Raises:
        DataError: The source does not exist or cannot be read.
    """
    first, *rest = data.source
    if not first.startswith(HUB_PREFIX):
        return ShardDocuments(data.source, data.text_key, state)
    options = HubOptions(config=data.source_config, split=data.source_split, data_files=tuple(rest))
    return HubDocuments(first.removeprefix(HUB_PREFIX), options, data.text_key, state)
