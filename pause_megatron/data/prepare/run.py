"""Preparation of a corpus: shards of text to PREFIX.bin, .idx, .tokenizer/ and, last, .manifest.json.

Each source becomes a part in PREFIX.parts/, and the parts are joined in the order of the sources. Finished parts
survive an interruption. So the bytes of a corpus depend only on its spec (sources, tokenizer, options), not on the
number of workers or of interruptions.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.data.corpus.records import CorpusSpec, TokenizerRecord
from pause_megatron.data.prepare.pool import PrepareProgress, run_tasks
from pause_megatron.data.prepare.publish import join_parts, merge_tallies
from pause_megatron.data.prepare.shard import PartRecord, ShardTask, WorkerConfig
from pause_megatron.data.prepare.workspace import Workspace
from pause_megatron.data.text.documents import Tally, TallyRecord
from pause_megatron.data.text.hub import HubOptions
from pause_megatron.data.text.malformed_limit import MalformedLimit
from pause_megatron.data.text.sources import ReadOptions, Source, find_sources
from pause_megatron.data.tokenizer.fast.encoders import EncoderName, choose_encoder
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import only_writer

MAX_MALFORMED = 1000
_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        manifest: Manifest of the corpus.
        already_done: Whether a complete corpus of the same spec existed.
        parts_reused: Number of finished parts of earlier runs.
        seconds: Wall-clock time of this run.
        encoder: What computed the ids, "library" or "gigatoken".
    """

    manifest: CorpusManifest
    already_done: bool
    parts_reused: int
    seconds: float
    encoder: EncoderName = "library"


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    hub: HubOptions | None = None,
    options: ReadOptions | None = None,
    workers: int | None = None,
    encoder: EncoderName = "auto",
    max_malformed: int | float = MAX_MALFORMED,
    overwrite: bool = False,
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
) -> Prepared:
    """Tokenize shards into a corpus, resuming from the finished shards of an earlier run of the same spec.

    Args:
        inputs: Paths and globs of shards, or one `hf:NAME`.
        tokenizer: Tokenizer of the corpus; its EOD ends each document.
        output: PREFIX of the corpus.
        hub: The part of the dataset to read, for `hf:NAME`.
        options: Text key, and what to do with damaged shards.
        workers: Number of processes, a shard each; None for the number of cores. 1 uses a thread of this process.
        encoder: What computes the ids, which do not depend on it: "library" for the tokenizer's own library,
            "gigatoken" for a faster one, "auto" for gigatoken where it is installed and proven to give equal ids.
        max_malformed: Limit of malformed lines: their number (int), or their fraction of all lines (float).
        overwrite: Replace a corpus or parts of another spec. The old corpus remains until the new one is complete.
        on_progress: Called about five times a second.

    Returns:
        The manifest of the corpus, and how it was prepared.

    Raises:
        DataError: Invalid input, too many malformed lines, a corpus of another spec at `output`, another process that
            prepares the same corpus, or a full disk.
    """
    begun = time.perf_counter()
    options = options or ReadOptions()
    limit = MalformedLimit(max_malformed)
    if isinstance(inputs, str):
        raise DataError(f"inputs: expected a list of shards, got one text: {inputs!r}")
    if workers is not None and workers < 1:
        raise DataError(f"--workers: expected 1 or more, got {workers}")
    sources = find_sources(inputs, hub, options.text_key, options.damaged_shards)
    spec = CorpusSpec(
        tokenizer=TokenizerRecord.of(tokenizer),
        text_key=options.text_key,
        damaged_shards=options.damaged_shards,
        sources=[source.identity() for source in sources],
    )
    workspace = Workspace(output, spec, sources)
    lock = path_of(output, "lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(lock, f"corpus {output}"):
            if not overwrite and (done := workspace.complete()):
                return Prepared(done, True, 0, time.perf_counter() - begun)
            try:
                encoder = choose_encoder(encoder, tokenizer)
                finished = workspace.open(tokenizer, overwrite=overwrite)
                shards = _Shards(sources, finished, limit, on_progress)
                parts = shards.prepare(WorkerConfig(workspace.folder, options, encoder), workers or _cores())
                manifest = join_parts(output, spec, parts, tokenizer, on_progress)
            finally:
                workspace.close()
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise  # for example a broken pipe of the progress bar
        raise DataError(
            f"cannot write {error.filename or output}: {os.strerror(error.errno or 0)}; finished shards are kept: "
            "resolve this and run the same command again"
        ) from None
    return Prepared(manifest, False, len(finished), time.perf_counter() - begun, encoder)


@dataclass(frozen=True)
class _Shards:
    """The shards of a corpus, of which earlier runs have finished some."""

    sources: Sequence[Source]
    finished: dict[int, PartRecord]
    limit: MalformedLimit
    on_progress: Callable[[PrepareProgress], None]

    def prepare(self, config: WorkerConfig, workers: int) -> list[PartRecord]:
        """Prepare the shards that are not finished, and return the parts of all in order.

        Args:
            config: Settings of the workers.
            workers: Number of processes.

        Raises:
            DataError: Too many malformed lines, or no documents at all.
        """
        tasks = [ShardTask(number, source) for number, source in enumerate(self.sources) if number not in self.finished]
        outcomes = run_tasks(
            tasks,
            self.finished,
            config,
            workers=workers,
            total_bytes=_total_bytes(self.sources),
            on_progress=self._report,
        )
        tallies = {number: Tally.from_record(part.malformed) for number, part in self.finished.items()}
        tallies |= {outcome.number: outcome.malformed for outcome in outcomes}
        malformed = merge_tallies(tallies[number] for number in sorted(tallies))
        parts = self.finished | {outcome.number: outcome.part for outcome in outcomes if outcome.part is not None}
        documents = sum(part.source.counts.documents for part in parts.values())
        if len(parts) < len(self.sources) or self.limit.exceeded(malformed.total, documents):
            raise DataError(
                f"stopped after {malformed.total:,} malformed lines, more than --max-malformed {self.limit.value} "
                f"allows:\n{malformed.describe()}"
            )
        if not documents:
            shutil.rmtree(config.folder)
            details = f"; malformed lines:\n{malformed.describe()}" if malformed.total else ""
            raise DataError(f"--input: expected documents, got none in {len(self.sources):,} sources{details}")
        return [parts[number] for number in sorted(parts)]

    def _report(self, progress: PrepareProgress) -> bool:
        """Pass on a report, and return whether the malformed lines are within the limit."""
        self.on_progress(progress)
        return not self.limit.should_abort(
            progress.malformed, progress.documents, progress.done_bytes, progress.total_bytes
        )


def _total_bytes(sources: Sequence[Source]) -> int | None:
    total = 0
    for source in sources:
        if source.bytes is None:
            return None
        total += source.bytes
    return total


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(prepared: Prepared, output: str | Path) -> str:
    """Return a summary of the result for the terminal.

    Args:
        prepared: The result of `prepare`.
        output: PREFIX of the corpus.
    """
    manifest, counts, tokenizer = prepared.manifest, prepared.manifest.counts, prepared.manifest.tokenizer
    text_bytes = sum(source.counts.text_bytes for source in manifest.sources)
    lines = [
        f"corpus {output}: {counts.documents:,} documents, {counts.tokens:,} tokens ({manifest.dtype}, EOD "
        f"{tokenizer.eod} after each document), {text_bytes / 1e6:,.2f} MB of text, "
        f"{text_bytes / counts.tokens:.2f} bytes per token, EODs included",
        f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, <pause> reserved as {tokenizer.pause_id}",
    ]
    if prepared.already_done:
        lines.insert(0, "already prepared: nothing to do")
    elif prepared.seconds > 0 and not prepared.parts_reused:
        rate = 1 / prepared.seconds
        lines.append(
            f"time: {prepared.seconds:,.1f} s ({counts.documents * rate:,.0f} documents/s, "
            f"{text_bytes / 1e6 * rate:,.2f} MB/s of text, {counts.tokens * rate:,.0f} tokens/s), encoder: "
            f"{prepared.encoder}"
        )
    elif prepared.parts_reused:
        lines.append(f"time: {prepared.seconds:,.1f} s; {prepared.parts_reused:,} finished shards were kept")
    if counts.malformed:
        tally = Tally.from_record(TallyRecord(counts=counts.malformed, places=manifest.places))
        lines.append(f"malformed lines left out: {counts.malformed_total:,}\n{tally.describe()}")
    return "\n".join(lines)
