"""One shard of text -> one part of a corpus. This is what each worker process of `prepare` runs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import token_dtype, write_index
from pause_megatron.data.corpus.manifest import FileRecord, Record, SourceRecord
from pause_megatron.data.text.documents import Malformed, Tally
from pause_megatron.data.text.sources import ReadOptions, Source
from pause_megatron.data.tokenizer.fast.encoders import Encoder, EncoderName, open_encoder
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import DigestFile, sync_folder, write_whole

BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 1024
COLUMNS = ("documents", "tokens", "text_bytes", "read_bytes", "malformed")


class Part(Record):
    """`PREFIX.parts/NNNNN.json`: written last, so it marks a finished part."""

    source: SourceRecord
    malformed: dict
    bin: FileRecord
    idx: FileRecord


@dataclass(frozen=True)
class ShardTask:
    """One source to prepare."""

    number: int
    source: Source


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a task. `part` is None when the run was stopped before the shard's end."""

    number: int
    part: Part | None
    malformed: Tally


class Counters:
    """Running sums of every shard, in memory that the workers share. Each cell has one writer, so there is no lock.

    A lock could be held by a worker at the moment it is killed.
    """

    def __init__(self, cells: MutableSequence[int]) -> None:
        self.cells = cells

    @staticmethod
    def size(shards: int) -> int:
        """Cells needed: one row a shard, and the stop flag."""
        return shards * len(COLUMNS) + 1

    def set(self, shard: int, values: tuple[int, ...]) -> None:
        """Publish a shard's sums, in the order of COLUMNS."""
        start = shard * len(COLUMNS)
        for offset, value in enumerate(values):
            self.cells[start + offset] = value

    def sum(self, column: str) -> int:
        """Sum of a column over all shards."""
        return sum(self.cells[COLUMNS.index(column) : len(self.cells) - 1 : len(COLUMNS)])

    @property
    def stopped(self) -> bool:
        """Whether the workers should stop after their batch."""
        return bool(self.cells[len(self.cells) - 1])

    def stop(self) -> None:
        """Ask the workers to stop after their batch."""
        self.cells[len(self.cells) - 1] = 1


@dataclass(frozen=True)
class Worker:
    """What a worker keeps between shards."""

    folder: Path
    tokenizer: Tokenizer
    encoder: Encoder
    options: ReadOptions
    counters: Counters

    def part_path(self, number: int, extension: str) -> Path:
        """PREFIX.parts/NNNNN.EXTENSION."""
        return self.folder / f"{number:05d}.{extension}"

    def run(self, task: ShardTask) -> ShardOutcome:
        """Prepare one shard.

        Raises:
            DataError: a source that cannot be read to its end or changes meanwhile, an id that cannot be, a full disk.
        """
        bin_path, idx_path = self.part_path(task.number, "bin"), self.part_path(task.number, "idx")
        with contextlib.ExitStack() as closing:
            try:
                bin_file = DigestFile(bin_path)
                closing.callback(bin_file.discard)
                writer = _PartWriter(bin_file, self.tokenizer, self.encoder)
                outcome = self._tokenize(task, writer)
                if outcome is None:
                    return ShardOutcome(task.number, None, writer.malformed)
                bin_file.publish()
                idx_file = DigestFile(idx_path)
                closing.callback(idx_file.discard)
                lengths = np.frombuffer(writer.lengths, dtype=np.int32)
                write_index(idx_file, writer.dtype, len(lengths), lambda: [lengths])
                idx_file.publish()
                sync_folder(self.folder)
                part = Part(
                    source=outcome,
                    malformed=writer.malformed.to_json(),
                    bin=FileRecord(bytes=bin_file.bytes, digest=bin_file.digest),
                    idx=FileRecord(bytes=idx_file.bytes, digest=idx_file.digest),
                )
                write_whole(self.part_path(task.number, "json"), part.model_dump_json().encode())
            except OSError as error:
                where = bin_path.with_suffix("")
                raise DataError(
                    f"cannot write {where}.*: {os.strerror(error.errno or 0)}; finished shards are kept: "
                    "make room and run the same command again"
                ) from None
        return ShardOutcome(task.number, part, writer.malformed)

    def _tokenize(self, task: ShardTask, writer: _PartWriter) -> SourceRecord | None:
        source = task.source
        stamp = _stamp(source)
        reader = source.open(self.options)
        for batch in _batches(reader.documents(), source.name, writer.malformed):
            writer.write(batch, source.name)
            self.counters.set(task.number, (*writer.sums(), reader.read_bytes, writer.malformed.total))
            if self.counters.stopped:
                return None
        if _stamp(source) != stamp:
            raise DataError(f"{source.name} was changed while it was read; run the same command again")
        documents, tokens, text_bytes = writer.sums()
        counts = {"documents": documents, "tokens": tokens, "text_bytes": text_bytes}
        malformed = writer.malformed.to_json()["counts"]
        return SourceRecord(
            identity=source.identity(), stamp=stamp, digest=reader.digest, counts={**counts, "malformed": malformed}
        )


class _PartWriter:
    """Tokenizes batches of documents into a `.bin`, an EOD after each, and remembers their lengths."""

    def __init__(self, file: DigestFile, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._encoder = encoder
        self.dtype = corpus_dtype(tokenizer)
        self.lengths = array("i")  # 4 bytes a document, where a list of integers takes 36
        self.malformed = Tally()
        self._tokens = 0
        self._text_bytes = 0

    def sums(self) -> tuple[int, int, int]:
        """Documents, tokens (EODs included) and UTF-8 bytes of text so far."""
        return len(self.lengths), self._tokens, self._text_bytes

    def write(self, texts: list[str], name: str) -> None:
        """Append documents."""
        if not texts:
            return
        encoded = self._encoder.encode_flat(texts)
        flat = np.insert(encoded.ids, np.cumsum(encoded.lengths), self._tokenizer.eod)
        self._check(flat, name)
        self._file.write(flat.astype(self.dtype).tobytes())
        self.lengths.frombytes((encoded.lengths + 1).astype(np.int32).tobytes())
        self._tokens += len(flat)
        self._text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

    def _check(self, ids: np.ndarray, name: str) -> None:
        # By construction no text gives these; a corpus that holds one would be wrong without a sign of it.
        if (ids == self._tokenizer.pause_id).any():
            raise DataError(
                f"{name}: a document encodes to the pause id {self._tokenizer.pause_id}; leave --pause-id out to "
                f"reserve id {self._tokenizer.vocab_size}, which no text reaches"
            )
        if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
            raise DataError(f"{name}: the tokenizer gave an id outside 0..{self._tokenizer.vocab_size - 1}")


def corpus_dtype(tokenizer: Tokenizer) -> str:
    """dtype of `.bin`: wide enough for the whole vocabulary with the pause id, so that it never has to change."""
    return token_dtype(max(tokenizer.vocab_size - 1, tokenizer.pause_id))


def _stamp(source: Source) -> dict:
    try:
        return source.stamp()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read ({error.strerror})") from None


def _batches(documents: Iterator[str | Malformed], name: str, tally: Tally) -> Iterator[list[str]]:
    """Groups documents for the tokenizer and counts the malformed lines between them. The last batch may be empty."""
    batch: list[str] = []
    characters = seen = 0
    for document in documents:
        seen += 1
        if isinstance(document, str):
            batch.append(document)
            characters += len(document)
        else:
            tally.add(name, document)
        if characters >= BATCH_CHARACTERS or seen >= BATCH_DOCUMENTS:
            yield batch
            batch, characters, seen = [], 0, 0
    yield batch


# The pool's initialiser leaves the worker's state here, one for each thread or process of a pool.
_local = threading.local()


def start_worker(
    folder: Path, options: ReadOptions, encoder: EncoderName, cells: MutableSequence[int], own_process: bool
) -> None:
    """Make this thread or process ready for `run_task`."""
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops the workers
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per shard is the parallelism
        threading.Thread(target=_die_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(folder / "tokenizer")
    _local.worker = Worker(folder, tokenizer, open_encoder(encoder, tokenizer), options, Counters(cells))


def run_task(task: ShardTask) -> ShardOutcome:
    """Prepare one shard in a worker that `start_worker` made ready."""
    return _local.worker.run(task)


def _die_with_parent() -> None:
    # A worker whose parent was killed would go on writing beside the workers of the next run.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
