"""Side arrays of a corpus: PREFIX.NAME.npy, one value for each token of the `.bin`, memory-mapped.

The file is of numpy's format, version 1.0. Its record in the manifest has its size, its digest and the digest of the
`.bin` that it belongs to. Here only the header that `header_of` writes is read: numpy's reader evaluates a header, and
unpickles arrays of objects.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.data.corpus.records import BlockRecord, FileRecord, SideRecord
from pause_megatron.errors import DataError

DTYPES: tuple[str, ...] = get_args(SideRecord.model_fields["dtype"].annotation)
"""Data types of the values, as numpy names them."""

_SAMPLED_BLOCKS, _BLOCK_VALUES = 256, 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = ("bin", "idx", "manifest", "parts", "lock", "tokenizer")
_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64


@dataclass(frozen=True)
class SideArray:
    """A side array whose file passed the constant-time checks of `find_side`.

    Attributes:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        record: Its record in the manifest.
        tokens: Number of its values: one for each token of the `.bin`.
    """

    prefix: str
    name: str
    record: SideRecord
    tokens: int

    @property
    def path(self) -> Path:
        """Path of its file."""
        return side_path(self.prefix, self.name)

    @property
    def title(self) -> str:
        """What it is, for messages."""
        return f"side array {self.path}"

    @property
    def label(self) -> str:
        """Its short name, for progress."""
        return self.path.name

    @property
    def files(self) -> dict[str, FileRecord]:
        """Size and digest of its file by extension."""
        return {f"{self.name}.npy": self.record.file}

    @property
    def blocks(self) -> dict[str, BlockRecord]:
        """Digests of blocks by extension: none, since its file has a single digest."""
        return {}

    @property
    def remedy(self) -> str:
        """What to do if it is damaged."""
        return f"copy it again, or {_written_again(self.prefix, self.name, self.record)}"

    def values(self) -> np.ndarray:
        """Return the values [tokens], memory-mapped and read-only.

        Raises:
            DataError: The file cannot be mapped.
        """
        offset = len(header_of(self.record.dtype, self.tokens))
        try:
            return np.memmap(self.path, dtype=self.record.dtype, mode="r", offset=offset, shape=(self.tokens,))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be mapped into memory ({error})") from None


@dataclass(frozen=True)
class Distribution:
    """The smallest value, the median and the largest value of a side array, or of a sample of it.

    Attributes:
        smallest: The smallest value.
        median: The median.
        largest: The largest value.
        values: Number of values that were read, all or evenly spaced blocks of them.
    """

    smallest: float
    median: float
    largest: float
    values: int


def distribution(values: np.ndarray) -> Distribution:
    """Return the distribution of an array in bounded time and memory: of at most 1,048,576 values.

    Args:
        values: The values [tokens].
    """
    if len(values) > _SAMPLED_BLOCKS * _BLOCK_VALUES:
        starts = np.linspace(0, len(values) - _BLOCK_VALUES, _SAMPLED_BLOCKS).astype(np.int64)
        values = np.concatenate([values[start : start + _BLOCK_VALUES] for start in starts])
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        return Distribution(0.0, 0.0, 0.0, 0)
    return Distribution(float(found.min()), float(np.median(found)), float(found.max()), len(found))


def open_side(prefix: str | Path, name: str) -> np.ndarray:
    """Return the values of a side array after checking, in constant time, that its file belongs to the corpus.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array (`data.side`).

    Returns:
        One value for each token of the `.bin`, in its order [tokens], memory-mapped and read-only.

    Raises:
        DataError: See `find_side`.
    """
    return find_side(prefix, name).values()


def find_side(prefix: str | Path, name: str, manifest: CorpusManifest | None = None) -> SideArray:
    """Return a side array after checking, in constant time, its record, its size and its header.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        manifest: Manifest of the corpus; None to read it.

    Raises:
        DataError: The manifest has no such side array, or one of another corpus; or its file is missing, truncated, or
            no array of the recorded dtype and length.
    """
    check_side_name(name)
    manifest = manifest or CorpusManifest.load(prefix)
    path, record = side_path(prefix, name), manifest.sides.get(name)
    if record is None:
        raise DataError(_no_record(prefix, name, manifest))
    if (record.bin, record.idx) != (manifest.files["bin"].digest, manifest.files["idx"].digest):
        raise DataError(
            f"{path}: expected values for the .bin of {manifest.files['bin'].digest}, got those of a corpus of "
            f"{record.bin}; {_written_again(prefix, name, record)}"
        )
    side = SideArray(str(prefix), name, record, manifest.counts.tokens)
    header = header_of(record.dtype, side.tokens)
    size = len(header) + side.tokens * np.dtype(record.dtype).itemsize
    if record.file.bytes != size:
        raise DataError(
            f"{path_of(prefix, 'manifest.json')}: sides.{name}: expected {size:,} bytes for {side.tokens:,} values of "
            f"{record.dtype}, got {record.file.bytes:,}"
        )
    try:
        with open(path, "rb") as file:
            found, begins = file.seek(0, 2), b""
            file.seek(0)
            begins = file.read(len(header))
    except FileNotFoundError:
        raise DataError(f"{path}: expected the side array of the manifest, got no such file; {side.remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if found != size:
        raise DataError(
            f"{path}: expected {size:,} bytes for {side.tokens:,} values of {record.dtype}, one for each token of the "
            f".bin, got {found:,}; {side.remedy}"
        )
    if begins != header:
        raise DataError(
            f"{path}: expected the header of {side.tokens:,} values of {record.dtype}, got {begins[:100]!r}; "
            f"{side.remedy}"
        )
    return side


def check_side_name(name: str) -> None:
    """Check that a name can be that of a side array.

    Args:
        name: The name.

    Raises:
        DataError: It cannot.
    """
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise DataError(
            f"name of a side array: expected up to 64 letters, digits, '_' and '-', and none of "
            f"{', '.join(_RESERVED)}; got {name!r}"
        )


def side_path(prefix: str | Path, name: str) -> Path:
    """Return the path PREFIX.NAME.npy.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
    """
    return path_of(prefix, f"{name}.npy")


def header_of(dtype: str, count: int) -> bytes:
    """Return the header of a one-dimensional array in numpy's format, version 1.0: its only accepted spelling.

    Args:
        dtype: Data type of the values, a numpy name.
        count: Number of values.
    """
    code = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': {code!r}, 'fortran_order': False, 'shape': ({count},), }}".encode("ascii")
    begins = len(_MAGIC) + 2
    padding = -(begins + len(text) + 1) % _ALIGNMENT
    text += b" " * padding + b"\n"
    return _MAGIC + struct.pack("<H", len(text)) + text


def describe_side(record: SideRecord) -> str:
    """Return what the values of a side array are, in a few words.

    Args:
        record: Its record.
    """
    if record.kind == "user":
        return f"{record.dtype}, values of the user's own"
    return f"{record.dtype}, {record.kind} of {record.model}"


def summarize_side(side: SideArray) -> str:
    """Return what the values of a side array are, and their distribution, as one line.

    Args:
        side: The side array.

    Raises:
        DataError: The file cannot be mapped.
    """
    found = distribution(side.values())
    sample = "" if found.values == side.tokens else f" of {found.values:,} sampled values"
    return (
        f"{side.tokens:,} values ({describe_side(side.record)}); smallest {found.smallest:.4g}, median "
        f"{found.median:.4g}, largest {found.largest:.4g}{sample}"
    )


def _written_again(prefix: str | Path, name: str, record: SideRecord) -> str:
    source = "--values FILE.npy" if record.kind == "user" else "--model FOLDER"
    return f"write it again with `pause-megatron score {prefix} --name {name} {source} --overwrite`"


def _no_record(prefix: str | Path, name: str, manifest: CorpusManifest) -> str:
    known = f"one of {', '.join(manifest.sides)}" if manifest.sides else "none: the corpus has no side array"
    path = side_path(prefix, name)
    there = f" ({path} is there, without a record in the manifest)" if path.exists() else ""
    return (
        f"corpus {prefix}: expected a side array of its manifest ({known}), got {name!r}{there}. Write one with "
        f"`pause-megatron score {prefix} --name {name} --model FOLDER`, or with --values FILE.npy for your own values"
    )
