"""One pass over the ids of a `.bin` of another program: digests, and ids that a corpus must not contain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import IndexHeader, read_lengths
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.records import BLOCK_BYTES, BlockRecord, FileRecord
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.digest import BlockDigests, Hasher, file_digest
from pause_megatron.terminal.progress import Report

SHOWN = 5
"""Number of locations that a message lists."""

READ_BYTES = 4 << 20


@dataclass
class Occurrences:
    """Occurrences of ids that a corpus must not contain.

    Attributes:
        count: Number of occurrences.
        ids: Smallest and largest id; None if there is no occurrence.
        places: The first `SHOWN` locations as (document, offset in tokens), both from 0.
    """

    count: int = 0
    ids: tuple[int, int] | None = None
    places: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: np.ndarray, documents: np.ndarray, offsets: np.ndarray) -> None:
        """Count occurrences.

        Args:
            ids: The ids, int64 [n].
            documents: Number of the document of each id, int64 [n].
            offsets: Offset of each id in its document, in tokens, int64 [n].
        """
        if not ids.size:
            return
        low, high = self.ids or (int(ids[0]), int(ids[0]))
        self.ids = min(low, int(ids.min())), max(high, int(ids.max()))
        self.count += ids.size
        wanted = SHOWN - len(self.places)
        self.places += zip(documents[:wanted].tolist(), offsets[:wanted].tolist(), strict=True)

    def __str__(self) -> str:
        shown = "; ".join(f"document {document:,}, token {offset:,}" for document, offset in self.places)
        return f"{shown}{'; ...' if self.count > len(self.places) else ''}"


@dataclass(frozen=True)
class Scan:
    """The result of `scan`.

    Attributes:
        file: Size and digest of the `.bin`.
        blocks: Digests of its blocks.
        tokens: Number of ids.
        eod: Number of EODs.
        pauses: Occurrences of the pause id.
        outside: Occurrences of ids outside the tokenizer's vocabulary.
        without_eod: Last tokens of documents that are not EOD; a document without tokens counts, at token 0.
        free_pause_ids: Number of ids, from the pause id on, that do not occur; None if none occurs.
        special: Number of occurrences by id of each special token, without EOD and pause.
    """

    file: FileRecord
    blocks: BlockRecord
    tokens: int
    eod: int
    pauses: Occurrences
    outside: Occurrences
    without_eod: Occurrences
    free_pause_ids: int | None
    special: dict[int, int]


def scan(prefix: str | Path, header: IndexHeader, tokenizer: Tokenizer, report: Report) -> Scan:
    """Read a `.bin` whole, in constant memory.

    Args:
        prefix: PREFIX of the corpus.
        header: Header of its `.idx`, whose entries have been checked.
        tokenizer: Tokenizer with its EOD and pause ids.
        report: Called after every 4 MiB.

    Raises:
        DataError: The file has become shorter or longer in the meantime.
    """
    path = path_of(prefix, "bin")
    whole, blocks = Hasher(), BlockDigests(BLOCK_BYTES)
    documents = _Documents(read_lengths(path_of(prefix, "idx"), header.documents))
    finder = _IdFinder(tokenizer)
    done, itemsize = 0, np.dtype(header.dtype).itemsize
    for data in _pieces(path):
        if len(data) % itemsize:
            break
        whole.update(data)
        blocks.update(data)
        ids = np.frombuffer(data, dtype=header.dtype)
        documents.advance(done // itemsize + ids.size)
        finder.check(ids, done // itemsize, documents)
        done += len(data)
        report(f"scan {Path(prefix).name}", done, header.bin_bytes)
    if done != header.bin_bytes:
        raise DataError(
            f"{path}: expected {header.bin_bytes:,} bytes, got {done:,}: it was written to while it was read"
        )
    return Scan(
        file=FileRecord(bytes=done, digest=whole.digest),
        blocks=BlockRecord(bytes=BLOCK_BYTES, digests=blocks.digests),
        tokens=done // itemsize,
        eod=finder.eod_count,
        pauses=finder.pauses,
        outside=finder.outside,
        without_eod=finder.without_eod,
        free_pause_ids=finder.first_used - tokenizer.pause_id if finder.first_used is not None else None,
        special={token: int(finder.special_counts[token]) for token in np.flatnonzero(finder.special_counts).tolist()},
    )


def digest_file(path: Path, stage: str, report: Report) -> FileRecord:
    """Return the size and the digest of a file.

    Args:
        path: Path of the file.
        stage: Name of the stage for `report`.
        report: Progress callback.
    """
    size, done = path.stat().st_size, 0

    def on_read(read: int) -> None:
        nonlocal done
        done += read
        report(stage, done, size)

    digest = file_digest(path, on_read=on_read)
    return FileRecord(bytes=done, digest=digest)


def pause_slots(tokenizer: Tokenizer) -> range:
    """Return the ids of the vocabulary, from the pause id on, that pause.embeddings=K could use as pauses."""
    stop = tokenizer.pause_id
    while stop < tokenizer.vocab_size:
        try:
            tokenizer.check_pause_ids(stop + 1 - tokenizer.pause_id)
        except DataError:
            break
        stop += 1
    return range(tokenizer.pause_id, stop)


class _IdFinder:
    """A checker of ids, piece by piece, that records those that a corpus must not contain."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._eod, self._pause_id, self._size = tokenizer.eod, tokenizer.pause_id, tokenizer.vocab_size
        self._slots = pause_slots(tokenizer)
        self._special = np.array([not tokenizer.reachable(token) for token in range(self._size)])
        for token in (self._eod, self._pause_id):
            self._special[token : token + 1] = False
        self.special_counts = np.zeros(self._size, dtype=np.int64)
        self.eod_count = 0
        self.first_used: int | None = None
        self.pauses, self.outside, self.without_eod = Occurrences(), Occurrences(), Occurrences()

    def check(self, ids: np.ndarray, start: int, documents: _Documents) -> None:
        """Check the ids of a piece.

        Args:
            ids: The ids, of any integer dtype [n].
            start: Position of the first id in the corpus, in tokens.
            documents: Documents, advanced to the end of the piece.
        """
        self.eod_count += int(np.count_nonzero(ids == self._eod))
        inside = ids
        if ids.min() < 0 or ids.max() >= self._size:
            outside = (ids < 0) | (ids >= self._size)
            self._record(self.outside, ids, outside, start, documents)
            inside = ids[~outside]
        self.special_counts += np.bincount(inside[self._special[inside]], minlength=self._size)
        if self._slots:
            self._record(self.pauses, ids, ids == self._pause_id, start, documents)
            used = ids[(ids > self._pause_id) & (ids < self._slots.stop)]
            if used.size:
                self.first_used = min(int(used.min()), self.first_used or self._size)
        self._check_ends(ids, start, documents)

    def _check_ends(self, ids: np.ndarray, start: int, documents: _Documents) -> None:
        lengths = np.diff(documents.bounds)
        last = np.maximum(documents.bounds[1:] - 1 - start, 0)  # ignored for an empty document
        missing = np.flatnonzero((lengths == 0) | (ids[last] != self._eod))
        self.without_eod.add(
            ids[last[missing]].astype(np.int64), documents.first + missing, np.maximum(lengths[missing] - 1, 0)
        )

    @staticmethod
    def _record(occurrences: Occurrences, ids: np.ndarray, mask: np.ndarray, start: int, documents: _Documents) -> None:
        found = np.flatnonzero(mask)
        if found.size:
            occurrences.add(ids[found].astype(np.int64), *documents.locate(start + found))


class _Documents:
    """A map from token positions to documents, which reads the lengths once.

    Attributes:
        first: Number of the first document that ends in the piece.
        bounds: Start of that document, and ends of the n documents that end in the piece, in tokens, int64 [n + 1].
    """

    def __init__(self, lengths: Iterable[np.ndarray]) -> None:
        self._lengths = iter(lengths)
        self._ahead = np.zeros(0, dtype=np.int64)  # ends that were read but not passed yet
        self._read_to = 0
        self.first = 0
        self.bounds = np.zeros(1, dtype=np.int64)

    def advance(self, token: int) -> None:
        """Advance to the documents that end at `token` or before it, and after the previous call's."""
        while self._read_to <= token and (chunk := next(self._lengths, None)) is not None:
            stops = self._read_to + np.cumsum(chunk, dtype=np.int64)
            self._ahead = np.concatenate([self._ahead, stops])
            self._read_to = int(stops[-1])
        passed = int(self._ahead.searchsorted(token, side="right"))
        self.first += self.bounds.size - 1
        self.bounds = np.concatenate([self.bounds[-1:], self._ahead[:passed]])
        self._ahead = self._ahead[passed:]

    def locate(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the document and the offset in it of each token position of the piece, both int64 [n]."""
        number = self.bounds[1:].searchsorted(tokens, side="right")
        return self.first + number, tokens - self.bounds[number]


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(READ_BYTES):
            yield data
