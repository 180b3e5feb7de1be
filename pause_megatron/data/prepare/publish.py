"""Joining the parts of a corpus, and making it visible: contents first, then the names, the manifest last."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import read_lengths, write_index
from pause_megatron.data.corpus.manifest import (
    TEMPORARY_FOLDERS,
    Counts,
    FileRecord,
    Manifest,
    Plan,
    path_of,
    replace_tokenizer,
)
from pause_megatron.data.prepare.joined import join_bins
from pause_megatron.data.prepare.pool import Progress
from pause_megatron.data.prepare.shard import Part, ShardOutcome, corpus_dtype
from pause_megatron.data.text.documents import Tally
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.files.durable import DigestFile, sync_folder


def join_parts(
    output: str | Path,
    folder: Path,
    plan: Plan,
    outcomes: list[ShardOutcome],
    tokenizer: Tokenizer,
    on_progress: Callable[[Progress], None],
) -> Manifest:
    """Join finished parts into a corpus at `output`, replacing an old one, and remove the parts.

    Args:
        output: PREFIX.
        folder: PREFIX.parts/.
        plan: of the corpus.
        outcomes: of all sources, in order.
        tokenizer: kept in PREFIX.tokenizer/.
        on_progress: called after each MiB or so.

    Raises:
        DataError: a part was altered on disk since it was written; it is prepared anew by the next run.
        OSError: the disk is full.
    """
    parts = [outcome.part for outcome in outcomes]
    total = sum(part.bin.bytes for part in parts)
    malformed = Tally()
    for outcome in outcomes:
        malformed.merge(outcome.malformed)
    counts = _sum_of([part.source.counts for part in parts], malformed)

    def report(parts_done: int, done_bytes: int) -> None:
        on_progress(
            Progress(
                phase="join",
                documents=counts.documents,
                tokens=counts.tokens,
                text_bytes=counts.text_bytes,
                malformed=counts.malformed_total,
                done_bytes=done_bytes,
                total_bytes=total,
                shards_done=parts_done,
                shards=len(parts),
            )
        )

    joined, bin_record, blocks = join_bins(folder, parts, report)
    idx_file = DigestFile(path_of(output, "idx"))
    try:
        write_index(idx_file, corpus_dtype(tokenizer), counts.documents, lambda: _all_lengths(folder, parts))
        idx_file.finish()
        manifest = Manifest(
            **plan.model_dump(exclude={"sources"}),
            dtype=corpus_dtype(tokenizer),
            counts=counts,
            places={kind: malformed.places[kind] for kind in sorted(malformed.places)},
            files={"bin": bin_record, "idx": FileRecord(bytes=idx_file.bytes, digest=idx_file.digest)},
            blocks=blocks,
            sources=[part.source for part in parts],
            adoption=None,
        )
        # Everything is on the disk. From here a kill leaves no manifest, and PREFIX.parts/ to go on from.
        replace_tokenizer(output, tokenizer)
        os.replace(joined, path_of(output, "bin"))
        idx_file.publish()
        sync_folder(idx_file.path.parent)
    finally:
        idx_file.discard()
    manifest.save(output)
    shutil.rmtree(folder)
    return manifest


def remove_partial_files(output: str | Path, folder: Path) -> None:
    """Remove what a killed run was in the middle of writing. Call it while holding the lock only."""
    for prefix in (path_of(output, "idx"), path_of(output, "manifest.json"), folder / "*"):
        pattern = str(prefix) if prefix.name == "*" else glob.escape(str(prefix))
        for name in glob.glob(f"{pattern}.*.tmp"):
            Path(name).unlink(missing_ok=True)
    for extension in TEMPORARY_FOLDERS:
        shutil.rmtree(path_of(output, extension), ignore_errors=True)


def _sum_of(counts: list[Counts], malformed: Tally) -> Counts:
    return Counts(
        documents=sum(each.documents for each in counts),
        tokens=sum(each.tokens for each in counts),
        text_bytes=sum(each.text_bytes for each in counts),
        malformed=dict(sorted(malformed.counts.items())),
    )


def _all_lengths(folder: Path, parts: list[Part]) -> Iterator[np.ndarray]:
    for number, part in enumerate(parts):
        yield from read_lengths(folder / f"{number:05d}.idx", part.source.counts.documents)
