"""The `.idx` file of a Megatron corpus, written and checked without torch and in constant memory.

Layout (megatron-core 0.16, megatron/core/datasets/indexed_dataset.py): the 9 magic bytes, version 1 (u64), dtype code
(u8), sequences S (u64), documents D (u64), then lengths int32 [S], byte offsets int64 [S], and the sequence numbers at
which documents end, int64 [D], beginning with 0; then, of multimodal data only, modes int8 [S]. Here a document is one
sequence, so D = S + 1. Megatron-LM's preprocess_data.py also writes ends of documents that hold no sequence, for empty
texts; megatron-core's GPT dataset counts sequences and looks at none of the ends.
megatron-core's own IndexedDatasetBuilder holds all three as lists of Python numbers (some 120 bytes a document: 44 GB
for C4) and is what the tests compare these bytes with.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pause_megatron.errors import DataError
from pause_megatron.files.durable import DigestFile

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# megatron-core's codes of integers; it has floats too (6 and 7), which no ids are.
_DTYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_CHUNK = 1 << 20


def token_dtype(largest_id: int) -> str:
    """Smallest dtype of `.bin` files, "uint16" or "int32", that holds every id up to `largest_id`."""
    return "uint16" if largest_id < 2**16 else "int32"


@dataclass(frozen=True)
class IndexHeader:
    """What the head and the last entries of an `.idx` say.

    Attributes:
        dtype: of the ids, a numpy name.
        documents: sequences, each of which is a document here.
        ends: entries that say where documents end: one more than there are documents, empty ones included.
        bin_bytes: the length that the `.bin` must have.
    """

    dtype: str
    documents: int
    ends: int
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


def read_lengths(path: Path, documents: int) -> Iterator[np.ndarray]:
    """The documents' lengths in tokens, int32 [<= 1 Mi] at a time."""
    return _entries(path, _HEADER.size, np.int32, documents)


def check_entries(path: Path, header: IndexHeader, on_read: Callable[[int], None]) -> None:
    """Check every entry of an `.idx` that somebody else wrote, in constant memory.

    Args:
        path: the `.idx`.
        header: what `read_header` said of it.
        on_read: told how many bytes were read, after every few MiB.

    Raises:
        DataError: a negative length, bytes that belong to no document or to two, or a document of several sequences.
    """
    itemsize, position, number = np.dtype(header.dtype).itemsize, 0, 0
    offsets = _entries(path, _HEADER.size + 4 * header.documents, np.int64, header.documents)
    for lengths, found in zip(read_lengths(path, header.documents), offsets, strict=True):
        stops = position + np.cumsum(lengths.astype(np.int64) * itemsize)
        expected = np.concatenate(([position], stops[:-1]))
        wrong = np.flatnonzero((lengths < 0) | (found != expected))
        if wrong.size:
            first = wrong[0]
            raise DataError(
                f"{path}: sequence {number + first:,}: expected 0 or more tokens from byte {expected[first]:,} on, "
                f"where the one before ends, got {lengths[first]:,} tokens from byte {found[first]:,} on"
            )
        position, number = int(stops[-1]), number + len(lengths)
        on_read(lengths.nbytes + found.nbytes)
    begun, last = 0, 0
    for ends in _entries(path, _HEADER.size + 12 * header.documents, np.int64, header.ends):
        steps = np.diff(ends, prepend=last)
        wrong = np.flatnonzero((steps < 0) | (steps > 1))
        if wrong.size:
            raise DataError(_why_no_document(path, max(begun + int(wrong[0]) - 1, 0), header))
        begun, last = begun + len(ends), int(ends[-1])
        on_read(ends.nbytes)
    if last != header.documents:
        raise DataError(f"{path}: expected its documents to end at sequence {header.documents:,}, got {last:,}")


def _why_no_document(path: Path, document: int, header: IndexHeader) -> str:
    if header.ends < 2:
        return (
            f"{path}: expected where each of its {header.documents:,} sequences ends a document, got no end: who wrote "
            "it called IndexedDatasetBuilder.add_item without end_document() behind each text. Write it again with it, "
            "or with add_document"
        )
    return (
        f"{path}: document {document:,} is not one sequence ({header.documents:,} sequences in {header.ends - 1:,} "
        "documents). That is what preprocess_data.py --split-sentences writes, for BERT and T5; GPT datasets shuffle "
        "sequences, which would tear these documents apart. Preprocess them again without --split-sentences, or "
        "prepare the texts with `pause-megatron prepare`"
    )


def _entries(path: Path, offset: int, dtype: type, count: int) -> Iterator[np.ndarray]:
    """Entries of one kind, [<= 1 Mi] at a time."""
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, count, _CHUNK):
            yield np.fromfile(file, dtype=dtype, count=min(_CHUNK, count - start))


def read_header(path: Path) -> IndexHeader:
    """Read and check the head and the last entries of an `.idx`, in constant time.

    Raises:
        DataError: missing, not an index, of a dtype that holds no ids, of sentences or images, or cut short.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            dtype, sequences, ends = _head(path, file.read(_HEADER.size), size)
            bin_bytes = 0
            if sequences:
                file.seek(_HEADER.size + 4 * (sequences - 1))
                (last_length,) = struct.unpack("<i", file.read(4))
                file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
                (last_offset,) = struct.unpack("<q", file.read(8))
                bin_bytes = last_offset + last_length * np.dtype(dtype).itemsize
    except OSError as error:
        raise DataError(f"{path}: the index cannot be read ({error.strerror})") from None
    return IndexHeader(dtype, sequences, ends, bin_bytes)


def _head(path: Path, head: bytes, size: int) -> tuple[str, int, int]:
    """The dtype, the number of sequences and the number of document ends, once they fit the file's size in bytes."""
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron index (expected the magic bytes {_MAGIC!r}, got {head[:9]!r})")
    _, version, code, sequences, ends = _HEADER.unpack(head)
    dtype = {number: name for name, number in _DTYPES.items()}.get(code)
    if version != 1 or dtype is None:
        known = ", ".join(f"{number} ({name})" for name, number in _DTYPES.items())
        raise DataError(f"{path}: version {version} with dtype code {code}; expected 1 with one of {known}")
    expected = _HEADER.size + 12 * sequences + 8 * ends
    if sequences and size == expected + sequences:
        raise DataError(
            f"{path}: multimodal, it has a mode for each of its {sequences:,} sequences; expected text only"
        )
    if size != expected:
        raise DataError(
            f"{path}: {size:,} bytes, but its header ({sequences:,} sequences, {ends:,} document ends) "
            f"needs {expected:,}: the file was cut or overwritten"
        )
    if ends < sequences + 1:
        raise DataError(_why_no_document(path, 0, IndexHeader(dtype, sequences, ends, 0)))
    return dtype, sequences, ends
