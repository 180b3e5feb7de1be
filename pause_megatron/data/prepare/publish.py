"""Joining of finished parts into a corpus, and its atomic publication: contents, then names, then the manifest."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import read_lengths, write_index
from pause_megatron.data.corpus.manifest import TEMPORARY_FOLDERS, CorpusManifest, path_of, replace_tokenizer
from pause_megatron.data.corpus.records import CorpusSpec, FileRecord, SourceCounts
from pause_megatron.data.corpus.side_writing import carried_sides, remove_sides
from pause_megatron.data.prepare.joined import JoinedBin, JoinedFile
from pause_megatron.data.prepare.pool import PrepareProgress
from pause_megatron.data.prepare.shard import PartRecord, corpus_dtype, part_path
from pause_megatron.data.text.documents import Tally
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.files.durable import DigestFile, sync_folder


def join_parts(
    output: str | Path,
    spec: CorpusSpec,
    parts: Sequence[PartRecord],
    tokenizer: Tokenizer,
    on_progress: Callable[[PrepareProgress], None],
) -> CorpusManifest:
    """Join the finished parts into a corpus, replacing an older one, and remove PREFIX.parts/.

    Args:
        output: PREFIX of the corpus.
        spec: Spec of the corpus.
        parts: Parts of all sources, in order.
        tokenizer: Tokenizer to save in PREFIX.tokenizer/.
        on_progress: Called after every MiB.

    Returns:
        The manifest that was written.

    Raises:
        DataError: A part was altered on disk after it was written; the next run prepares it again.
        OSError: A file cannot be written.
    """
    folder = path_of(output, "parts")
    malformed = merge_tallies(Tally.from_record(part.malformed) for part in parts)
    counts = _total_counts(parts, malformed)
    total_bytes = sum(part.bin.bytes for part in parts)

    def report(parts_done: int, done_bytes: int) -> None:
        on_progress(
            PrepareProgress(
                phase="join",
                documents=counts.documents,
                tokens=counts.tokens,
                text_bytes=counts.text_bytes,
                malformed=counts.malformed_total,
                done_bytes=done_bytes,
                total_bytes=total_bytes,
                shards_done=parts_done,
                shards=len(parts),
            )
        )

    joined = JoinedFile(folder).join(parts, report)
    idx_file = DigestFile(path_of(output, "idx"))
    try:
        write_index(idx_file, corpus_dtype(tokenizer), counts.documents, lambda: _all_lengths(folder, parts))
        idx_file.finish()
        idx_record = FileRecord(bytes=idx_file.bytes, digest=idx_file.digest)
        manifest = _manifest(spec, parts, joined, idx_record, malformed)
        manifest, foreign = carried_sides(output, manifest)
        # All contents are on disk. A kill from here on leaves no manifest, and PREFIX.parts/ to resume from.
        replace_tokenizer(output, tokenizer)
        os.replace(joined.path, path_of(output, "bin"))
        idx_file.publish()
        sync_folder(idx_file.path.parent)
    finally:
        idx_file.discard()
    manifest.save(output)
    remove_sides(foreign)
    shutil.rmtree(folder)
    return manifest


def remove_partial_files(output: str | Path, folder: Path) -> None:
    """Remove the temporary files of a killed run. Call this only while holding the lock of the corpus.

    Args:
        output: PREFIX of the corpus.
        folder: PREFIX.parts/.
    """
    for prefix in (path_of(output, "idx"), path_of(output, "manifest.json"), folder / "*"):
        pattern = str(prefix) if prefix.name == "*" else glob.escape(str(prefix))
        for name in glob.glob(f"{pattern}.*.tmp"):
            Path(name).unlink(missing_ok=True)
    for extension in TEMPORARY_FOLDERS:
        shutil.rmtree(path_of(output, extension), ignore_errors=True)


def merge_tallies(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies, which are given in the order of the sources."""
    merged = Tally()
    for tally in tallies:
        merged.merge(tally)
    return merged


def _manifest(
    spec: CorpusSpec, parts: Sequence[PartRecord], joined: JoinedBin, idx_record: FileRecord, malformed: Tally
) -> CorpusManifest:
    return CorpusManifest(
        tokenizer=spec.tokenizer,
        text_key=spec.text_key,
        damaged_shards=spec.damaged_shards,
        dtype=corpus_dtype(spec.tokenizer),
        counts=_total_counts(parts, malformed),
        places=malformed.to_record().places,
        files={"bin": joined.file, "idx": idx_record},
        blocks=joined.blocks,
        sources=[part.source for part in parts],
        adoption=None,
    )


def _total_counts(parts: Sequence[PartRecord], malformed: Tally) -> SourceCounts:
    counts = [part.source.counts for part in parts]
    return SourceCounts(
        documents=sum(each.documents for each in counts),
        tokens=sum(each.tokens for each in counts),
        text_bytes=sum(each.text_bytes for each in counts),
        malformed=malformed.to_record().counts,
    )


def _all_lengths(folder: Path, parts: Sequence[PartRecord]) -> Iterator[np.ndarray]:
    for number, part in enumerate(parts):
        yield from read_lengths(part_path(folder, number, "idx"), part.source.counts.documents)
