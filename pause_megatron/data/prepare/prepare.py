"""Shards of text -> PREFIX.bin, PREFIX.idx, PREFIX.tokenizer/ and, last, PREFIX.manifest.json.

Each source becomes a part in PREFIX.parts/, finished parts survive whatever happens, and the parts are then joined in
the order of the sources. So the bytes of a corpus depend on its plan (sources, tokenizer, options) alone: not on the
number of workers, nor on how often the preparation was killed and started again.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.manifest import Manifest, Plan, TokenizerRecord, path_of, read_record
from pause_megatron.data.prepare.joined import joined_parts, keep_joined
from pause_megatron.data.prepare.pool import Progress, run_tasks
from pause_megatron.data.prepare.publish import join_parts, remove_partial_files
from pause_megatron.data.prepare.shard import Part, ShardOutcome, ShardTask
from pause_megatron.data.text.documents import Tally
from pause_megatron.data.text.malformed_limit import MalformedLimit
from pause_megatron.data.text.sources import HubOptions, ReadOptions, Source, find_sources
from pause_megatron.data.tokenizer.fast.encoders import EncoderName, choose_encoder
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import only_writer, write_whole

PLAN_NAME = "plan.json"
MAX_MALFORMED = 1000
_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
        manifest: of the corpus.
        already_done: True when a complete corpus of the same plan was there.
        parts_reused: finished parts that an earlier run had left.
        seconds: wall-clock time of this run.
        encoder: what computed the ids, "library" or "gigatoken".
    """

    manifest: Manifest
    already_done: bool
    parts_reused: int
    seconds: float
    encoder: EncoderName = "library"


def prepare(
    inputs: list[str],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    hub: HubOptions | None = None,
    options: ReadOptions | None = None,
    workers: int | None = None,
    encoder: EncoderName = "auto",
    max_malformed: int | float = MAX_MALFORMED,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Prepared:
    """Prepare a corpus, going on from the finished shards of an earlier run of the same plan.

    Args:
        inputs: paths and globs of shards, or one `hf:NAME`.
        tokenizer: its EOD ends each document.
        output: PREFIX.
        hub: config, split, ... of `hf:NAME`.
        options: text key, and what to do with damaged shards.
        workers: processes, a shard each; default: the cores of this process. 1 works in a thread of this process.
        encoder: "library": the tokenizer's own; "gigatoken": a faster one; "auto": gigatoken where it is installed and
            proven to give the same ids. The corpus does not depend on it.
        max_malformed: lines that may be malformed (int), or their fraction of all lines (float).
        overwrite: replace a corpus (or parts) of another plan. The old corpus stays until the new one is complete.
        on_progress: called about five times a second.

    Raises:
        DataError: bad input, too many malformed lines, another plan in the place, another process at work, a full disk.
    """
    begun = time.perf_counter()
    options = options or ReadOptions()
    limit = MalformedLimit(max_malformed)
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers}: expected 1 or more")
    sources = find_sources(inputs, hub, options.text_key, options.damaged_shards)
    plan = Plan(
        tokenizer=TokenizerRecord.of(tokenizer),
        text_key=options.text_key,
        damaged_shards=options.damaged_shards,
        sources=[source.identity() for source in sources],
    )
    workplace = _Workplace(output, plan, sources)
    lock = path_of(output, "lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(lock, f"corpus {output}"):
            if not overwrite and (done := workplace.complete()):
                return Prepared(done, True, 0, time.perf_counter() - begun)
            try:
                encoder = choose_encoder(encoder, tokenizer)
                finished = workplace.open(tokenizer, overwrite)
                outcomes = _all_outcomes(workplace, finished, options, encoder, workers or _cores(), limit, on_progress)
                manifest = join_parts(output, workplace.folder, plan, outcomes, tokenizer, on_progress)
            finally:
                workplace.leave()
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise  # a broken pipe behind the progress bar, say
        raise DataError(
            f"cannot write {error.filename or output}: {os.strerror(error.errno or 0)}; finished shards are kept: mend "
            "it and run the same command again"
        ) from None
    return Prepared(manifest, False, len(finished), time.perf_counter() - begun, encoder)


class _Workplace:
    """PREFIX and PREFIX.parts/: what an earlier run left there, and whether this run may use it."""

    def __init__(self, output: str | Path, plan: Plan, sources: list[Source]) -> None:
        self.output = output
        self.plan = plan
        self.sources = sources
        self.folder = path_of(output, "parts")

    def complete(self) -> Manifest | None:
        """The manifest of a complete corpus of the same plan, None where there is no corpus at all.

        Raises:
            DataError: a corpus of another plan, of sources that have changed since, or damaged; or files of others.
        """
        if not path_of(self.output, "manifest.json").exists():
            foreign = [path_of(self.output, name) for name in ("bin", "idx") if path_of(self.output, name).exists()]
            if foreign and not (self.folder / PLAN_NAME).exists():
                raise DataError(
                    f"{foreign[0]} is there without a manifest, so `prepare` did not make it; name another --output, "
                    f"replace it with --overwrite, or keep it with `pause-megatron adopt {self.output} --tokenizer T`"
                )
            return None
        manifest = Manifest.load(self.output)
        if manifest.adoption is not None:
            raise DataError(
                f"a corpus is at {self.output} already, made by others and adopted; name another --output, or replace "
                "it with --overwrite"
            )
        self._refuse_differences(manifest.plan, f"a corpus is at {self.output} already")
        for source, record in zip(self.sources, manifest.sources, strict=True):
            if not source.unchanged(record.stamp, record.digest):
                raise DataError(
                    f"corpus {self.output} was prepared from another content of {source.name}; prepare it anew with "
                    "--overwrite, or name another --output"
                )
        open_corpus(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    def open(self, tokenizer: Tokenizer, overwrite: bool) -> dict[int, Part]:
        """Make PREFIX.parts/ ready and return its finished parts by number."""
        plan_path = self.folder / PLAN_NAME
        if plan_path.exists():
            found = read_record(plan_path, Plan)
            if found != self.plan:
                if any(self.folder.glob("[0-9]*.json")) and not overwrite:
                    self._refuse_differences(found, f"an unfinished preparation is at {self.folder}")
                shutil.rmtree(self.folder)
        if not plan_path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            tokenizer.save(self.folder / "tokenizer")
            write_whole(plan_path, self.plan.model_dump_json().encode())
        remove_partial_files(self.output, self.folder)
        finished = {}
        joined = joined_parts(self.output, self.folder)
        for number, source in enumerate(self.sources):
            part = self._finished_part(number, source, number < joined)
            if part is None:
                joined = min(joined, number)
                (self.folder / f"{number:05d}.json").unlink(missing_ok=True)
            else:
                finished[number] = part
        keep_joined(self.folder, [finished[number] for number in range(joined)])
        return finished

    def leave(self) -> None:
        """After success or failure: no unfinished file stays, and no folder that holds nothing worth keeping."""
        remove_partial_files(self.output, self.folder)
        if self.folder.exists() and not any(self.folder.glob("[0-9]*.json")):
            shutil.rmtree(self.folder)

    def _finished_part(self, number: int, source: Source, joined: bool) -> Part | None:
        path = self.folder / f"{number:05d}.json"
        if not path.exists():
            return None
        part = read_record(path, Part)
        for extension, record in (("bin", part.bin), ("idx", part.idx)):
            file = path.with_suffix(f".{extension}")
            if extension == "bin" and joined:
                continue  # its bytes are in joined.bin
            if not file.is_file() or file.stat().st_size != record.bytes:
                return None
        return part if source.unchanged(part.source.stamp, part.source.digest) else None

    def _refuse_differences(self, found: Plan, what: str) -> None:
        if differences := found.differences(self.plan):
            raise DataError(
                f"{what}, of other sources or options; name another --output, or replace it with --overwrite. What "
                "differs:\n  " + "\n  ".join(differences)
            )


def _all_outcomes(
    workplace: _Workplace,
    finished: dict[int, Part],
    options: ReadOptions,
    encoder: EncoderName,
    workers: int,
    limit: MalformedLimit,
    on_progress: Callable[[Progress], None],
) -> list[ShardOutcome]:
    """Outcomes of all shards in order: those finished before and those prepared now. Checks the malformed limit."""
    outcomes = [ShardOutcome(number, part, Tally.from_json(part.malformed)) for number, part in finished.items()]
    tasks = [ShardTask(number, source) for number, source in enumerate(workplace.sources) if number not in finished]
    outcomes += run_tasks(
        tasks,
        outcomes,
        workplace.folder,
        options,
        encoder,
        workers=workers,
        hopeless=lambda now: limit.hopeless(now.malformed, now.documents, now.done_bytes, now.total_bytes),
        total_bytes=_total_bytes(workplace.sources),
        on_progress=on_progress,
    )
    outcomes.sort(key=lambda outcome: outcome.number)
    malformed = Tally()
    for outcome in outcomes:
        malformed.merge(outcome.malformed)
    documents = sum(outcome.part.source.counts.documents for outcome in outcomes if outcome.part)
    stopped = len(outcomes) < len(workplace.sources) or any(outcome.part is None for outcome in outcomes)
    if stopped or limit.exceeded(malformed.total, documents):
        raise DataError(
            f"stopped after {malformed.total:,} malformed lines, more than --max-malformed {limit.value} allows:\n"
            f"{malformed.describe()}"
        )
    if not documents:
        shutil.rmtree(workplace.folder)
        found = f"; malformed lines:\n{malformed.describe()}" if malformed.total else ""
        raise DataError(f"the input holds no documents ({len(outcomes):,} sources were read){found}")
    return outcomes


def _total_bytes(sources: list[Source]) -> int | None:
    sizes = [source.bytes for source in sources]
    return None if None in sizes else sum(sizes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(prepared: Prepared, output: str | Path) -> str:
    """The result in words, with units."""
    manifest = prepared.manifest
    counts = manifest.counts
    record = manifest.tokenizer
    lines = [
        f"corpus {output}: {counts.documents:,} documents, {counts.tokens:,} tokens ({manifest.dtype}, EOD "
        f"{record.eod} after each document), {counts.text_bytes / 1e6:,.2f} MB of text, "
        f"{counts.text_bytes / counts.tokens:.2f} bytes per token, EOD among them",
        f"tokenizer: {record.kind}, {record.vocab_size:,} ids, <pause> reserved as {record.pause_id}",
    ]
    if prepared.already_done:
        lines.insert(0, "already prepared: nothing to do")
    elif prepared.seconds > 0 and not prepared.parts_reused:
        rate = 1 / prepared.seconds
        lines.append(
            f"time: {prepared.seconds:,.1f} s ({counts.documents * rate:,.0f} documents/s, "
            f"{counts.text_bytes / 1e6 * rate:,.2f} MB/s of text, {counts.tokens * rate:,.0f} tokens/s), encoder: "
            f"{prepared.encoder}"
        )
    elif prepared.parts_reused:
        lines.append(f"time: {prepared.seconds:,.1f} s; {prepared.parts_reused:,} finished shards were kept")
    if counts.malformed:
        tally = Tally.from_json({"counts": counts.malformed, "places": manifest.places})
        lines.append(f"malformed lines left out: {counts.malformed_total:,}\n{tally.describe()}")
    return "\n".join(lines)
