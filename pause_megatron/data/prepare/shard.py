"""Tokenization of one shard into one part of a corpus: the code of the worker processes of `prepare`."""

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
from pydantic import JsonValue

from pause_megatron.data.corpus.index_file import token_dtype, write_index
from pause_megatron.data.corpus.records import FileRecord, FrozenModel, SourceCounts, SourceRecord, TokenizerRecord
from pause_megatron.data.prepare.counters import ShardSums, SharedCounters
from pause_megatron.data.text.documents import Malformed, Tally, TallyRecord
from pause_megatron.data.text.sources import ReadOptions, Source
from pause_megatron.data.tokenizer.fast.encoders import Encoder, EncoderName, open_encoder
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import DigestFile, sync_folder, write_whole

BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 1024


class PartRecord(FrozenModel):
    """The content of `PREFIX.parts/NNNNN.json`, which is written last and marks a finished part.

    Attributes:
        source: The source as it was read.
        malformed: Its malformed lines.
        bin: Size and digest of the part's .bin.
        idx: Size and digest of the part's .idx.
    """

    source: SourceRecord
    malformed: TallyRecord
    bin: FileRecord
    idx: FileRecord


@dataclass(frozen=True)
class ShardTask:
    """One source to prepare.

    Attributes:
        number: Index of the source, from 0.
        source: The source.
    """

    number: int
    source: Source


@dataclass(frozen=True)
class ShardOutcome:
    """The result of a task.

    Attributes:
        number: Index of the source, from 0.
        part: The finished part; None if the run was stopped before the end of the shard.
        malformed: The malformed lines so far.
    """

    number: int
    part: PartRecord | None
    malformed: Tally


@dataclass(frozen=True)
class Worker:
    """The state that a worker keeps between shards.

    Attributes:
        folder: PREFIX.parts/.
        tokenizer: Tokenizer of the corpus.
        encoder: Encoder that computes the ids.
        options: How shards are parsed.
        counters: Running sums of all shards.
    """

    folder: Path
    tokenizer: Tokenizer
    encoder: Encoder
    options: ReadOptions
    counters: SharedCounters

    def run(self, task: ShardTask) -> ShardOutcome:
        """Prepare one shard.

        Raises:
            DataError: The source cannot be read to its end or was changed while it was read, the tokenizer returned
                an invalid id, or the disk is full.
        """
        bin_path = part_path(self.folder, task.number, "bin")
        with contextlib.ExitStack() as closing:
            try:
                bin_file = DigestFile(bin_path)
                closing.callback(bin_file.discard)
                writer = _PartWriter(bin_file, self.tokenizer, self.encoder)
                outcome = self._tokenize(task, writer)
                if outcome is None:
                    return ShardOutcome(task.number, None, writer.malformed)
                bin_file.publish()
                idx_file = DigestFile(part_path(self.folder, task.number, "idx"))
                closing.callback(idx_file.discard)
                lengths = np.frombuffer(writer.lengths, dtype=np.int32)
                write_index(idx_file, writer.dtype, len(lengths), lambda: [lengths])
                idx_file.publish()
                sync_folder(self.folder)
                part = PartRecord(
                    source=outcome,
                    malformed=writer.malformed.to_record(),
                    bin=FileRecord(bytes=bin_file.bytes, digest=bin_file.digest),
                    idx=FileRecord(bytes=idx_file.bytes, digest=idx_file.digest),
                )
                write_whole(part_path(self.folder, task.number, "json"), part.model_dump_json().encode())
            except OSError as error:
                where = bin_path.with_suffix("")
                raise DataError(
                    f"cannot write {where}.*: {os.strerror(error.errno or 0)}; finished shards are kept: "
                    "free disk space and run the same command again"
                ) from None
        return ShardOutcome(task.number, part, writer.malformed)

    def _tokenize(self, task: ShardTask, writer: _PartWriter) -> SourceRecord | None:
        source = task.source
        stamp = _stamp(source)
        reader = source.open(self.options)
        for batch in _batches(reader.documents(), source.name, writer.malformed):
            writer.write(batch, source.name)
            self.counters.set(task.number, writer.sums(reader.read_bytes))
            if self.counters.stopped:
                return None
        if _stamp(source) != stamp:
            raise DataError(f"{source.name}: changed while it was read; run the same command again")
        sums = writer.sums(reader.read_bytes)
        counts = SourceCounts(
            documents=sums.documents,
            tokens=sums.tokens,
            text_bytes=sums.text_bytes,
            malformed=writer.malformed.to_record().counts,
        )
        return SourceRecord(identity=source.identity(), stamp=stamp, digest=reader.digest, counts=counts)


class _PartWriter:
    """A writer that tokenizes documents into a `.bin`, with an EOD after each, and keeps their lengths."""

    def __init__(self, file: DigestFile, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._encoder = encoder
        self.dtype = corpus_dtype(tokenizer)
        self.lengths = array("i")  # 4 bytes per document; a list of integers takes 36
        self.malformed = Tally()
        self._tokens = 0
        self._text_bytes = 0

    def sums(self, read_bytes: int) -> ShardSums:
        """Return the sums so far, where `read_bytes` of the source were read."""
        return ShardSums(len(self.lengths), self._tokens, self._text_bytes, read_bytes, self.malformed.total)

    def write(self, texts: list[str], name: str) -> None:
        """Append a batch of documents.

        Args:
            texts: The documents.
            name: Name of the source, for messages.
        """
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
        # No text encodes to these ids by construction; a corpus with one would be silently wrong.
        if (ids == self._tokenizer.pause_id).any():
            raise DataError(
                f"{name}: expected no pause id in the text, got a document that encodes to {self._tokenizer.pause_id}; "
                f"leave --pause-id out to reserve id {self._tokenizer.vocab_size}, which no text encodes to"
            )
        if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
            raise DataError(
                f"{name}: expected ids 0 to {self._tokenizer.vocab_size - 1} of the tokenizer, got {ids.min()} to "
                f"{ids.max()}"
            )


def part_path(folder: Path, number: int, extension: str) -> Path:
    """Return the path PREFIX.parts/NNNNN.EXTENSION of a part.

    Args:
        folder: PREFIX.parts/.
        number: Index of the source, from 0.
        extension: "bin", "idx" or "json".
    """
    return folder / f"{number:05d}.{extension}"


def corpus_dtype(tokenizer: Tokenizer | TokenizerRecord) -> str:
    """Return the dtype of the `.bin`, wide enough for the whole vocabulary and the pause id."""
    return token_dtype(max(tokenizer.vocab_size - 1, tokenizer.pause_id))


def _stamp(source: Source) -> dict[str, JsonValue]:
    try:
        return source.stamp()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read ({error.strerror})") from None


def _batches(documents: Iterator[str | Malformed], name: str, tally: Tally) -> Iterator[list[str]]:
    """Yield batches of documents, counting the malformed lines between them; the last batch may be empty."""
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


# State of the worker, set by the pool's initializer in each thread or process.
_local = threading.local()


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of the workers of a preparation.

    Attributes:
        folder: PREFIX.parts/, with the tokenizer in it.
        options: How shards are parsed.
        encoder: What computes the ids, "library" or "gigatoken".
    """

    folder: Path
    options: ReadOptions
    encoder: EncoderName


def start_worker(config: WorkerConfig, cells: MutableSequence[int], own_process: bool) -> None:
    """Initialize this thread or process for `run_task`.

    Args:
        config: Settings of the worker.
        cells: Cells of the `SharedCounters`.
        own_process: Whether this is a process of its own, not a thread of the caller.
    """
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops the workers
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the shards are processed in parallel already
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(config.folder / "tokenizer")
    encoder = open_encoder(config.encoder, tokenizer)
    _local.worker = Worker(config.folder, tokenizer, encoder, config.options, SharedCounters(cells))


def run_task(task: ShardTask) -> ShardOutcome:
    """Prepare one shard in a worker that `start_worker` initialized."""
    worker: Worker = _local.worker
    return worker.run(task)


def _exit_with_parent() -> None:
    # Without this, a worker whose parent was killed would write concurrently with the workers of the next run.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
