"""Sources of documents: shards on disk, or shards of a Hugging Face dataset. One process reads one source."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pydantic import JsonValue

from pause_megatron.data.text.documents import Malformed, parse_lines, parse_record
from pause_megatron.data.text.hub import HUB_PREFIX, HubOptions, OptionNames, first_line, open_hub
from pause_megatron.data.text.shard_file import DamagedShard, ShardFile, check_start, compression_of, is_shard_name
from pause_megatron.errors import DataError
from pause_megatron.files.digest import file_digest

DamagedShards = Literal["error", "keep"]
"""What to do with a damaged shard: stop with an error, or keep the readable part."""

_NAMES = OptionNames("--input ", "--hf-config", "--hf-split", "--text-key")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of the parsing of shards into documents. They are part of the spec of a corpus.

    Attributes:
        text_key: Key of the text in a JSON object, or column of a dataset.
        damaged_shards: Whether a damaged shard is an error, or its readable part is kept.
    """

    text_key: str = "text"
    damaged_shards: DamagedShards = "error"


class Source(Protocol):
    """A sequence of documents that one process reads from front to back."""

    @property
    def name(self) -> str:
        """Path or dataset, for messages and the manifest."""

    @property
    def bytes(self) -> int | None:
        """Size as stored, in bytes; None where it is not known in advance."""

    def identity(self) -> dict[str, JsonValue]:
        """Return the JSON values that distinguish this source from others."""

    def stamp(self) -> dict[str, JsonValue]:
        """Return the JSON values that change when the content may have changed, such as the modification time."""

    def unchanged(self, stamp: dict[str, JsonValue], digest: str | None) -> bool:
        """Return whether the content is the same as when this stamp and digest were taken.

        Args:
            stamp: An earlier result of `stamp`.
            digest: The digest of the reader after that pass; None where there was none.
        """

    def open(self, options: ReadOptions) -> SourceReader:
        """Return a reader for one pass over the source."""


class SourceReader(Protocol):
    """One pass over a source."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the source as stored, read so far."""

    @property
    def digest(self) -> str | None:
        """Digest 'xxh3_128:HEX' of the source as stored, after the pass; None where there is none."""

    def documents(self) -> Iterator[str | Malformed]:
        """Yield the documents and the malformed lines in order.

        Raises:
            DataError: The source cannot be read to its end.
        """


@dataclass(frozen=True)
class FileSource:
    """A shard of JSON lines on disk, plain, .gz or .zst.

    Attributes:
        name: Absolute path of the shard.
        bytes: Size of the file.
    """

    name: str
    bytes: int

    def identity(self) -> dict[str, JsonValue]:
        """Return the path and the size of the file."""
        return {"name": self.name, "bytes": self.bytes}

    def stamp(self) -> dict[str, JsonValue]:
        """Return the modification time of the file, in nanoseconds."""
        try:
            return {"mtime_ns": os.stat(self.name).st_mtime_ns}
        except OSError:
            return {"mtime_ns": None}  # a missing file is reported when it is read

    def unchanged(self, stamp: dict[str, JsonValue], digest: str | None) -> bool:
        """Return whether the modification time or the content is the same."""
        # A copy or a new download has another modification time but the same bytes: then the digest decides.
        return stamp == self.stamp() or digest == _digest_if_readable(Path(self.name))

    def open(self, options: ReadOptions) -> FileReader:
        """Return a reader for one pass over the file."""
        return FileReader(self, options)


class FileReader:
    """One pass over a shard on disk."""

    def __init__(self, source: FileSource, options: ReadOptions) -> None:
        self._file = ShardFile(source.name)
        self._options = options
        self._truncated = False

    @property
    def read_bytes(self) -> int:
        """Bytes of the file as stored, read so far."""
        return self._file.read_bytes

    @property
    def digest(self) -> str | None:
        """Digest 'xxh3_128:HEX' of the whole file as stored; None where it cannot be read."""
        # The digest of ShardFile covers only what was read.
        return _digest_if_readable(self._file.path) if self._truncated else self._file.digest

    def documents(self) -> Iterator[str | Malformed]:
        """Yield the documents and the malformed lines in order.

        Raises:
            DamagedShard: The shard is damaged, and `damaged_shards` is "error".
        """
        try:
            yield from parse_lines(self._file.lines(), self._options.text_key)
        except DamagedShard as error:
            if self._options.damaged_shards == "error":
                raise
            self._truncated = True
            yield Malformed("damaged-shard", self._file.line + 1, error.reason)


@dataclass(frozen=True)
class HubSource:
    """One shard of a Hugging Face dataset that is streamed, such as `hf:allenai/c4`.

    Attributes:
        dataset: Name of the dataset on the Hub, a folder, or a loader.
        options: The part of the dataset to read.
        shard: Index of this shard, from 0.
        shards: Number of shards of the split.
        origin: Commit of the Hub, or modification times of local files.
        bytes: Always None; the size is not known in advance.
    """

    dataset: str
    options: HubOptions
    shard: int
    shards: int
    origin: str = field(repr=False)
    bytes: None = None

    @property
    def name(self) -> str:
        """Data set, split and shard, for messages and the manifest."""
        return f"{HUB_PREFIX}{self.dataset}[{self.options.split}] shard {self.shard} of {self.shards}"

    def identity(self) -> dict[str, JsonValue]:
        """Return the dataset, the shard and the options that were given."""
        return {
            "name": self.name,
            "config": self.options.config,
            "revision": self.options.revision,
            "data_files": list(self.options.data_files),
        }

    def stamp(self) -> dict[str, JsonValue]:
        """Return the commit of the Hub, or the modification times of local files."""
        return {"origin": self.origin}

    def unchanged(self, stamp: dict[str, JsonValue], digest: str | None) -> bool:
        """Return whether the commit or the modification times are the same."""
        return stamp == self.stamp()

    def open(self, options: ReadOptions) -> HubReader:
        """Return a reader for one pass over the shard."""
        return HubReader(self, options)


class HubReader:
    """One pass over a shard of a Hugging Face dataset.

    Attributes:
        read_bytes: Always 0; the size as stored is not known.
        digest: Always None, for the same reason.
    """

    read_bytes = 0
    digest = None

    def __init__(self, source: HubSource, options: ReadOptions) -> None:
        self._source = source
        self._options = options

    def documents(self) -> Iterator[str | Malformed]:
        """Yield the documents and the malformed records in order.

        Raises:
            DataError: `datasets` cannot open the dataset, or stops before its end.
        """
        source = self._source
        number = 0
        try:
            _, stream = open_hub(source.dataset, source.options, self._options.text_key, _NAMES)
            for record in stream.shard(num_shards=source.shards, index=source.shard):
                number += 1
                yield parse_record(record, number, self._options.text_key)
        except DataError:
            raise
        except Exception as error:  # each loader raises its own format library's exceptions
            raise DataError(f"{source.name}: datasets stopped after record {number:,} ({first_line(error)})") from error


def find_sources(
    inputs: Sequence[str],
    hub: HubOptions | None = None,
    text_key: str = "text",
    damaged_shards: DamagedShards = "error",
) -> list[Source]:
    """Return the sources that the --input arguments name, in the order of their documents in the corpus.

    Args:
        inputs: Paths and globs of shards, or one `hf:NAME`. The files of a glob are in natural order (2 before 10).
        hub: The part of the dataset to read, for `hf:NAME`.
        text_key: Column of the text; checked where the dataset declares its columns.
        damaged_shards: "error" checks the first bytes of each shard now; "keep" leaves that to the reader.

    Returns:
        One source per shard; a shard that two globs match appears once.

    Raises:
        DataError: No such input, an empty input, an unreadable shard, or one of an unknown format.
    """
    named = [text for text in inputs if text.startswith(HUB_PREFIX)]
    if named:
        if len(inputs) > 1:
            raise DataError(f"--input {' '.join(inputs)}: expected either shards or one {HUB_PREFIX}NAME, got both")
        return _hub_sources(named[0].removeprefix(HUB_PREFIX), hub or HubOptions(), text_key)
    sources: dict[str, FileSource] = {}
    for pattern in inputs:
        for path in _matches(pattern):
            compression_of(path)
            name = os.path.abspath(path)
            size = path.stat().st_size if path.is_file() else 0
            sources.setdefault(name, FileSource(name, size))  # two globs may overlap
    if not sources:
        raise DataError("--input: expected shards (paths or globs) or hf:NAME, got nothing")
    if not any(source.bytes for source in sources.values()):
        raise DataError(
            f"--input: expected documents, got {_count(len(sources))} of 0 bytes, the first is {next(iter(sources))}"
        )
    if damaged_shards == "error":
        for name in sources:
            check_start(Path(name))
    return list(sources.values())


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts shard-2 before shard-10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        raise DataError(
            f"--input {pattern}: expected shards, got a folder: name its shards, for example '{path}/*.json.gz'"
        )
    if path.exists():
        return [path]
    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True), key=natural_order)
    # Folders and broken links that a glob matches are skipped, unless they are named like a shard.
    files = [Path(name) for name in found if os.path.isfile(name) or (is_shard_name(name) and not _is_special(name))]
    if not files:
        folder = path.parent
        raise DataError(
            f"--input {pattern}: expected a shard, got no such file"
            + (f" (the folder {folder} does not exist)" if not folder.exists() and "*" not in str(folder) else "")
        )
    return files


def _is_special(name: str) -> bool:
    """Return whether a path is a pipe, a socket or a device: opening one may block for ever."""
    return os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)


def _digest_if_readable(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None


def _hub_sources(dataset: str, options: HubOptions, text_key: str) -> list[Source]:
    builder, stream = open_hub(dataset, options, text_key, _NAMES)
    files = (builder.config.data_files or {}).get(options.split)
    # The commit of the Hub, or the modification times of local files.
    origin = str(sorted(map(str, files.origin_metadata))) if files is not None else str(builder.hash)
    shards = stream.num_shards
    return [HubSource(dataset, options, shard, shards, origin) for shard in range(shards)]


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"
