"""Documents one after another without end, and a state from which reading goes on: of shards on disk, or of `datasets`.

After the last document comes the first again. Lines that are no documents are left out and counted.
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

# So many records without a document between them are no accident, but a wrong key, say, of a source of terabytes.
MALFORMED_IN_A_ROW = 10_000
_NAMES = OptionNames("data.source=", "data.source_config", "data.source_split", "data.text_key")


class Documents(Protocol):
    """A reader of documents.

    Attributes:
        name: of the shard or data set at which it is.
        malformed: what was left out since it was opened.
    """

    name: str
    malformed: Tally

    def take(self, count: int) -> list[str]:
        """The next documents. Raises DataError where the source cannot be read or holds no documents."""

    def state(self) -> dict[str, Any]:
        """Where the next document stands; plain values."""


class ShardDocuments:
    """Shards of JSON lines, in natural order. Goes on by reading the shard again up to the line where it stood."""

    def __init__(self, inputs: Sequence[str], text_key: str, state: dict[str, Any] | None) -> None:
        self._options = ReadOptions(text_key=text_key)
        self._sources = find_sources(inputs, text_key=text_key)
        self.malformed = Tally()
        self._state = dict(state or {"epoch": 0, "shard": 0, "line": 0})
        self._lines = self._pass()

    @property
    def name(self) -> str:
        return self._sources[self._state["shard"]].name

    def take(self, count: int) -> list[str]:
        return _take(self, self._lines, count)

    def state(self) -> dict[str, Any]:
        return dict(self._state)

    def _pass(self) -> Iterator[str | Malformed | None]:
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
    """A data set that `datasets` streams. Goes on by the state that `datasets` gives."""

    def __init__(self, name: str, options: HubOptions, text_key: str, state: dict[str, Any] | None) -> None:
        self.name, self._options, self._text_key = HUB_PREFIX + name, options, text_key
        self._dataset = name
        self.malformed = Tally()
        self._epoch = 0 if state is None else state["epoch"]
        self._stream = self._open()
        # What the stream was given; it has no state of its own before its first record.
        self._given = None if state is None else state["datasets"]
        self._begun = False
        if self._given is not None:
            self._stream.load_state_dict(self._given)
        self._records = self._pass()

    def take(self, count: int) -> list[str]:
        return _take(self, self._records, count)

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "datasets": self._stream.state_dict() if self._begun else self._given}

    def _open(self):
        return open_hub(self._dataset, self._options, self._text_key, _NAMES)[1]

    def _pass(self) -> Iterator[str | Malformed | None]:
        number = 0
        while True:
            try:
                for record in self._stream:
                    self._begun = True
                    number += 1
                    yield parse_record(record, number, self._text_key)
            except Exception as error:
                raise DataError(
                    f"data.source={self.name}: datasets stopped after record {number:,} "
                    f"({first_line(error)}); the same command goes on from the last checkpoint"
                ) from error
            # A new pass needs a new object: one that was given a state would begin at that state again.
            self._epoch, self._given, self._begun = self._epoch + 1, None, False
            self._stream = self._open()
            yield None


def _take(reader: Documents, records: Iterator[str | Malformed | None], count: int) -> list[str]:
    """Documents until there are `count`, or the end of a pass (None) after at least one."""
    found: list[str] = []
    passes = malformed = 0
    while len(found) < count:
        record = next(records)
        if record is None:
            passes += 1
            if found:
                break
            if passes > 1:
                raise _no_documents(reader, "it holds no documents")
        elif isinstance(record, Malformed):
            reader.malformed.add(reader.name, record)
            malformed += 1
            if malformed >= MALFORMED_IN_A_ROW and not found:
                raise _no_documents(reader, f"{malformed:,} records one after another hold no document")
        else:
            found.append(record)
    return found


def _no_documents(reader: Documents, what: str) -> DataError:
    return DataError(f"data.source: {what}; data.text_key is the key of the text\n{reader.malformed.describe()}")


def open_documents(data: DataSection, state: dict[str, Any] | None = None) -> Documents:
    """The documents of data.source, from a state on.

    Raises:
        DataError: nothing there, or not readable.
    """
    first, *rest = data.source
    if not first.startswith(HUB_PREFIX):
        return ShardDocuments(data.source, data.text_key, state)
    options = HubOptions(config=data.source_config, split=data.source_split, data_files=tuple(rest))
    return HubDocuments(first.removeprefix(HUB_PREFIX), options, data.text_key, state)
