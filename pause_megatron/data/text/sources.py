"""Where documents come from: shards on disk, or a data set read through `datasets`.

A source is what one process reads.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pause_megatron.data.text.documents import Malformed, parse_lines, parse_record
from pause_megatron.data.text.hub import HUB_PREFIX, HubOptions, OptionNames, first_line, open_hub
from pause_megatron.data.text.shard_file import DamagedShard, ShardFile, check_start, compression_of, is_shard_name
from pause_megatron.errors import DataError
from pause_megatron.files.durable import digest_of

_NAMES = OptionNames("--input ", "--hf-config", "--hf-split", "--text-key")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How shards become documents. Part of what determines a corpus."""

    text_key: str = "text"
    damaged_shards: Literal["error", "keep"] = "error"


class Source(Protocol):
    """What one process reads, from front to back.

    Attributes:
        name: path or data set, for messages and the manifest.
        bytes: size as stored, or None where it is not known beforehand.
    """

    name: str
    bytes: int | None

    def identity(self) -> dict:
        """What makes it this source and no other; plain values."""

    def stamp(self) -> dict:
        """What changes when its content may have changed; plain values."""

    def unchanged(self, stamp: dict, digest: str | None) -> bool:
        """Whether the content is still the one that had this stamp and digest."""

    def open(self, options: ReadOptions) -> SourceReader:
        """Begin to read."""


class SourceReader(Protocol):
    """One pass over a source. `read_bytes` and `digest` are of the source as stored."""

    read_bytes: int
    digest: str | None

    def documents(self) -> Iterator[str | Malformed]:
        """Documents and malformed lines in order. Raises DataError where the source breaks off."""


@dataclass(frozen=True)
class FileSource:
    """One shard on disk: JSON lines, plain, .gz or .zst."""

    name: str
    bytes: int

    def identity(self) -> dict:
        return {"name": self.name, "bytes": self.bytes}

    def stamp(self) -> dict:
        try:
            return {"mtime_ns": os.stat(self.name).st_mtime_ns}
        except OSError:
            return {"mtime_ns": None}  # gone, or never there: reading it says so

    def unchanged(self, stamp: dict, digest: str | None) -> bool:
        # A copy or a fresh download has another time but the same bytes: then the digest decides.
        return stamp == self.stamp() or digest == _digest_if_readable(Path(self.name))

    def open(self, options: ReadOptions) -> FileReader:
        return FileReader(self, options)


class FileReader:
    """One pass over a shard on disk."""

    def __init__(self, source: FileSource, options: ReadOptions) -> None:
        self._file = ShardFile(source.name)
        self._options = options
        self._broke_off = False

    @property
    def read_bytes(self) -> int:
        return self._file.read_bytes

    @property
    def digest(self) -> str | None:
        # The one taken on the way is of what was read.
        return _digest_if_readable(self._file.path) if self._broke_off else self._file.digest

    def documents(self) -> Iterator[str | Malformed]:
        try:
            yield from parse_lines(self._file.lines(), self._options.text_key)
        except DamagedShard as error:
            if self._options.damaged_shards == "error":
                raise
            self._broke_off = True
            yield Malformed("damaged-shard", self._file.line + 1, error.reason)


@dataclass(frozen=True)
class HubSource:
    """One shard of a data set that `datasets` streams (`hf:allenai/c4`)."""

    dataset: str
    options: HubOptions
    shard: int
    shards: int
    origin: str = field(repr=False)
    bytes: None = None

    @property
    def name(self) -> str:
        return f"{HUB_PREFIX}{self.dataset}[{self.options.split}] shard {self.shard} of {self.shards}"

    def identity(self) -> dict:
        return {
            "name": self.name,
            "config": self.options.config,
            "revision": self.options.revision,
            "data_files": list(self.options.data_files),
        }

    def stamp(self) -> dict:
        return {"origin": self.origin}

    def unchanged(self, stamp: dict, digest: str | None) -> bool:
        return stamp == self.stamp()

    def open(self, options: ReadOptions) -> HubReader:
        return HubReader(self, options)


class HubReader:
    """One pass over a shard of a `datasets` data set."""

    read_bytes = 0
    digest = None

    def __init__(self, source: HubSource, options: ReadOptions) -> None:
        self._source = source
        self._options = options

    def documents(self) -> Iterator[str | Malformed]:
        source = self._source
        number = 0
        try:
            _, stream = open_hub(source.dataset, source.options, self._options.text_key, _NAMES)
            for record in stream.shard(num_shards=source.shards, index=source.shard):
                number += 1
                yield parse_record(record, number, self._options.text_key)
        except DataError:
            raise
        except Exception as error:  # loaders raise whatever their format's library raises
            raise DataError(f"{source.name}: datasets stopped after record {number:,} ({first_line(error)})") from error


def find_sources(
    inputs: Sequence[str],
    hub: HubOptions | None = None,
    text_key: str = "text",
    damaged_shards: Literal["error", "keep"] = "error",
) -> list[Source]:
    """Resolve what a user named into sources, in the order in which their documents will stand.

    Args:
        inputs: paths and globs of shards, or one `hf:NAME`. Each glob's files come in natural order (2 before 10).
        hub: for `hf:NAME`.
        text_key: column that must be there, where a data set says its columns beforehand.
        damaged_shards: "keep" leaves it to the reading to say which shards cannot be opened or are something else.

    Raises:
        DataError: nothing there, nothing in it, not readable, or of an unknown kind.
    """
    named = [text for text in inputs if text.startswith(HUB_PREFIX)]
    if named:
        if len(inputs) > 1:
            raise DataError(f"--input {' '.join(inputs)}: expected either shards or one {HUB_PREFIX}NAME, came both")
        return _hub_sources(named[0].removeprefix(HUB_PREFIX), hub or HubOptions(), text_key)
    sources: dict[str, Source] = {}
    for pattern in inputs:
        for path in _matches(pattern):
            compression_of(path)
            name = os.path.abspath(path)
            size = path.stat().st_size if path.is_file() else 0
            sources.setdefault(name, FileSource(name, size))  # two globs may overlap
    if not sources:
        raise DataError("no input: give shards (paths or globs) or hf:NAME with --input")
    if not any(source.bytes for source in sources.values()):
        raise DataError(f"the input is empty: {_count(len(sources))} of 0 bytes, the first is {next(iter(sources))}")
    if damaged_shards == "error":
        for name in sources:
            check_start(Path(name))
    return list(sources.values())


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts shard-2 before shard-10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        raise DataError(f"--input {pattern} is a folder: name its shards, for example '{path}/*.json.gz'")
    if path.exists():
        return [path]
    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True), key=natural_order)
    # A folder or a broken link among the shards is passed over, unless it has the name of a shard: then it is damage.
    files = [Path(name) for name in found if os.path.isfile(name) or (is_shard_name(name) and not _is_special(name))]
    if not files:
        folder = path.parent
        raise DataError(
            f"--input {pattern}: no such file"
            + (f" (the folder {folder} does not exist)" if not folder.exists() and "*" not in str(folder) else "")
        )
    return files


def _is_special(name: str) -> bool:
    """A pipe, a socket or a device: opening one may wait for ever."""
    return os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)


def _digest_if_readable(path: Path) -> str | None:
    try:
        return digest_of(path)
    except OSError:
        return None


def _hub_sources(dataset: str, options: HubOptions, text_key: str) -> list[Source]:
    builder, stream = open_hub(dataset, options, text_key, _NAMES)
    files = (builder.config.data_files or {}).get(options.split)
    # Commit of the Hub, or times of local files: what tells one state of the data from another.
    origin = str(sorted(map(str, files.origin_metadata))) if files is not None else str(builder.hash)
    shards = stream.num_shards
    return [HubSource(dataset, options, shard, shards, origin) for shard in range(shards)]


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"
