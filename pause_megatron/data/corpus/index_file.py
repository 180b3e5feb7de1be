"""The `.idx` file of a Megatron-LM corpus: writer and validator in constant memory, without torch.

Layout (megatron-core 0.16, megatron/core/datasets/indexed_dataset.py): the 9 magic bytes, version 1 (u64), dtype code
(u8), sequences S (u64), documents D (u64), then lengths int32 [S], byte offsets int64 [S], and the sequence numbers at
which documents end, int64 [D], beginning with 0. Multimodal data has modes, int8 [S], at the end. Here a document is
one sequence, so D = S + 1. Megatron-LM's preprocess_data.py also writes ends of documents without a sequence, for empty
texts; megatron-core's GPT dataset counts sequences and does not read the ends.

megatron-core's IndexedDatasetBuilder keeps all three as Python lists (about 120 bytes per document: 44 GB for C4). The
tests compare the bytes written here with those of that builder.
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
# megatron-core's dtype codes of integers; its codes of floats (6 and 7) cannot be token ids.
_DTYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_CHUNK = 1 << 20


def token_dtype(largest_id: int) -> str:
    """Return the smallest dtype of a `.bin`, "uint16" or "int32", that holds every id up to `largest_id`."""
    return "uint16" if largest_id < 2**16 else "int32"


@dataclass(frozen=True)
class IndexHeader:
    """The header of an `.idx`, and the size of the `.bin` that its last entries imply.

    Attributes:
        dtype: Data type of the ids, a numpy name.
        documents: Number of sequences, each of which is one document.
        ends: Number of document ends: one more than there are documents, empty ones included.
        bin_bytes: Required size of the `.bin`.
    """

    dtype: str
    documents: int
    ends: int
    bin_bytes: int


def write_index(file: DigestFile, dtype: str, documents: int, lengths: Callable[[], Iterable[np.ndarray]]) -> None:
    """Write an `.idx`.

    Args:
        file: The file to write to.
        dtype: Data type of the `.bin`, "uint16" or "int32".
        documents: Number of documents.
        lengths: Called twice; returns the documents' lengths in tokens as int32 arrays of any size, in order.
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
    """Return an iterator over the documents' lengths in tokens.

    Args:
        path: Path of the `.idx`.
        documents: Number of documents.

    Returns:
        int32 arrays of at most 2**20 lengths, in order.
    """
    return _entries(path, _HEADER.size, np.int32, documents)


def check_entries(path: Path, header: IndexHeader, on_read: Callable[[int], None]) -> None:
    """Check every entry of an `.idx` that another program wrote, in constant memory.

    Args:
        path: Path of the `.idx`.
        header: Its header, from `read_header`.
        on_read: Called with the number of bytes read, after every few MiB.

    Raises:
        DataError: A negative length, offsets with a gap or an overlap, or a document of several sequences.
    """
    _check_sequences(path, header, on_read)
    _check_ends(path, header, on_read)


def _check_sequences(path: Path, header: IndexHeader, on_read: Callable[[int], None]) -> None:
    """Check that each sequence begins where the previous one ends."""
    itemsize, position, number = np.dtype(header.dtype).itemsize, 0, 0
    offsets = _entries(path, _HEADER.size + 4 * header.documents, np.int64, header.documents)
    for lengths, found in zip(read_lengths(path, header.documents), offsets, strict=True):
        stops = position + np.cumsum(lengths.astype(np.int64) * itemsize)
        expected = np.concatenate(([position], stops[:-1]))
        wrong = np.flatnonzero((lengths < 0) | (found != expected))
        if wrong.size:
            first = wrong[0]
            raise DataError(
                f"{path}: sequence {number + first:,}: expected 0 or more tokens at byte {expected[first]:,}, "
                f"the end of the previous one, got {lengths[first]:,} tokens at byte {found[first]:,}"
            )
        position, number = int(stops[-1]), number + len(lengths)
        on_read(lengths.nbytes + found.nbytes)


def _check_ends(path: Path, header: IndexHeader, on_read: Callable[[int], None]) -> None:
    """Check that each document consists of at most one sequence, and that the last one ends at the last sequence."""
    begun, last = 0, 0
    for ends in _entries(path, _HEADER.size + 12 * header.documents, np.int64, header.ends):
        steps = np.diff(ends, prepend=last)
        wrong = np.flatnonzero((steps < 0) | (steps > 1))
        if wrong.size:
            raise DataError(_not_one_sequence(path, max(begun + int(wrong[0]) - 1, 0), header))
        begun, last = begun + len(ends), int(ends[-1])
        on_read(ends.nbytes)
    if last != header.documents:
        raise DataError(f"{path}: expected its documents to end at sequence {header.documents:,}, got {last:,}")


def _not_one_sequence(path: Path, document: int, header: IndexHeader) -> str:
    if header.ends < 2:
        return (
            f"{path}: expected a document end for each of its {header.documents:,} sequences, got none: it was written "
            "with IndexedDatasetBuilder.add_item without end_document() after each text. Write it again with "
            "end_document(), or with add_document"
        )
    return (
        f"{path}: document {document:,}: expected one sequence per document, got {header.documents:,} sequences in "
        f"{header.ends - 1:,} documents. preprocess_data.py --split-sentences writes these for BERT and T5; a GPT "
        "dataset would shuffle the sentences of a document. Preprocess the texts again without --split-sentences, or "
        "prepare them with `pause-megatron prepare`"
    )


def _entries(path: Path, offset: int, dtype: type, count: int) -> Iterator[np.ndarray]:
    """Yield the entries of one kind in arrays of at most 2**20."""
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, count, _CHUNK):
            yield np.fromfile(file, dtype=dtype, count=min(_CHUNK, count - start))


def read_header(path: Path) -> IndexHeader:
    """Read and check the header and the last entries of an `.idx`, in constant time.

    Args:
        path: Path of the `.idx`.

    Raises:
        DataError: The file is missing, not an index, truncated, multimodal, of a dtype that cannot hold token ids, or
            of documents of several sequences.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            dtype, sequences, ends = _parse_header(path, file.read(_HEADER.size), size)
            bin_bytes = 0
            if sequences:
                file.seek(_HEADER.size + 4 * (sequences - 1))
                (last_length,) = struct.unpack("<i", file.read(4))
                file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
                (last_offset,) = struct.unpack("<q", file.read(8))
                bin_bytes = last_offset + last_length * np.dtype(dtype).itemsize
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return IndexHeader(dtype, sequences, ends, bin_bytes)


def _parse_header(path: Path, head: bytes, size: int) -> tuple[str, int, int]:
    """Return dtype, number of sequences and number of document ends, after checking the file's size."""
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise DataError(f"{path}: expected a Megatron index with the magic bytes {_MAGIC!r}, got {head[:9]!r}")
    _, version, code, sequences, ends = _HEADER.unpack(head)
    dtype = {number: name for name, number in _DTYPES.items()}.get(code)
    if version != 1 or dtype is None:
        known = ", ".join(f"{number} ({name})" for name, number in _DTYPES.items())
        raise DataError(f"{path}: expected version 1 with a dtype code of {known}, got version {version} with {code}")
    expected = _HEADER.size + 12 * sequences + 8 * ends
    if sequences and size == expected + sequences:
        raise DataError(
            f"{path}: expected an index of text, got a multimodal one with modes of its {sequences:,} sequences"
        )
    if size != expected:
        raise DataError(
            f"{path}: expected {expected:,} bytes for {sequences:,} sequences and {ends:,} document ends, got "
            f"{size:,}: the file was truncated or overwritten"
        )
    if ends < sequences + 1:
        raise DataError(_not_one_sequence(path, 0, IndexHeader(dtype, sequences, ends, 0)))
    return dtype, sequences, ends
