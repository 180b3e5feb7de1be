"""The `.idx` file of a Megatron corpus, written and checked without torch and in constant memory.

Layout (megatron-core 0.16, megatron/core/datasets/indexed_dataset.py): the 9 magic bytes, version 1 (u64), dtype code
(u8), sequences S (u64), documents D (u64), then lengths int32 [S], byte offsets int64 [S], and the sequence numbers at
which documents end, int64 [D], beginning with 0. Here a document is one sequence, so D = S + 1.
megatron-core's own IndexedDatasetBuilder holds all three as lists of Python numbers (some 120 bytes a document: 44 GB
for C4) and is what the tests compare these bytes with.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pause_megatron.durable import DigestFile
from pause_megatron.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {"int32": 4, "uint16": 8}
_CHUNK = 1 << 20


def token_dtype(largest_id: int) -> str:
    """Smallest dtype of `.bin` files, "uint16" or "int32", that holds every id up to `largest_id`."""
    return "uint16" if largest_id < 2**16 else "int32"


@dataclass(frozen=True)
class IndexHeader:
    """What the head and the last entries of an `.idx` say. `bin_bytes` is the length its `.bin` must have."""

    dtype: str
    documents: int
    bin_bytes: int


def write_index(file: DigestFile, dtype: str, documents: int, lengths: Callable[[], Iterable[np.ndarray]]) -> None:
    """Write an `.idx`.

    Args:
        file: where to.
        dtype: of the `.bin`, "uint16" or "int32".
        documents: number of documents.
        lengths: called twice; gives the documents' lengths in tokens as int32 arrays [any], in order.
    """
    file.write(_HEADER.pack(_MAGIC, 1, _DTYPES[dtype], documents, documents + 1))
    for chunk in lengths():
        file.write(chunk.astype(np.int32).tobytes())
    offset = np.int64(0)
    itemsize = np.dtype(dtype).itemsize
    for chunk in lengths():
        ends = offset + np.cumsum(chunk.astype(np.int64) * itemsize)
        file.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes() if len(chunk) else b"")
        offset = ends[-1] if len(chunk) else offset
    for start in range(0, documents + 1, _CHUNK):
        file.write(np.arange(start, min(start + _CHUNK, documents + 1), dtype=np.int64).tobytes())


def read_lengths(path: Path, documents: int) -> Iterable[np.ndarray]:
    """The documents' lengths in tokens, int32 [<= 1 Mi] at a time, of an `.idx` written by `write_index`."""
    with open(path, "rb") as file:
        file.seek(_HEADER.size)
        for start in range(0, documents, _CHUNK):
            yield np.fromfile(file, dtype=np.int32, count=min(_CHUNK, documents - start))


def read_header(path: Path) -> IndexHeader:
    """Read and check the head and the last entries of an `.idx`, in constant time.

    Raises:
        DataError: missing, not an index, of a dtype that no corpus of ours has, or cut short.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or not head.startswith(_MAGIC):
                raise DataError(
                    f"{path}: not a Megatron index (expected the magic bytes {_MAGIC!r}, came {head[:9]!r})"
                )
            _, version, code, sequences, documents = _HEADER.unpack(head)
            dtype = {number: name for name, number in _DTYPES.items()}.get(code)
            if version != 1 or dtype is None:
                raise DataError(
                    f"{path}: version {version} with dtype code {code}; expected 1 with 4 (int32) or 8 (uint16)"
                )
            expected = _HEADER.size + 12 * sequences + 8 * documents
            if size != expected:
                raise DataError(
                    f"{path}: {size:,} bytes, but its header ({sequences:,} sequences, {documents:,} document ends) "
                    f"needs {expected:,}: the file was cut or overwritten"
                )
            if documents != sequences + 1:
                raise DataError(f"{path}: {sequences:,} sequences in {documents - 1:,} documents; expected one in each")
            bin_bytes = 0
            if sequences:
                file.seek(_HEADER.size + 4 * (sequences - 1))
                (last_length,) = struct.unpack("<i", file.read(4))
                file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
                (last_offset,) = struct.unpack("<q", file.read(8))
                bin_bytes = last_offset + last_length * np.dtype(dtype).itemsize
    except OSError as error:
        raise DataError(f"{path}: the index cannot be read ({error.strerror})") from None
    return IndexHeader(dtype, sequences, bin_bytes)
