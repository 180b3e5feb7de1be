"""Adoption of a `.bin` and `.idx` of another program: writes PREFIX.tokenizer/ and, last, PREFIX.manifest.json.

The two files are only read. The corpus cannot be opened before the manifest exists, so a killed run needs no cleanup:
the same command starts again.
"""

from __future__ import annotations

import errno
import glob
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pause_megatron.data.adopt.scan import Scan, digest_file, scan
from pause_megatron.data.adopt.tokenizer_check import (
    Agreement,
    SampledDocument,
    agreement_of,
    most_common_end,
    sample_documents,
)
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.index_file import IndexHeader, check_entries, read_header
from pause_megatron.data.corpus.manifest import CorpusManifest, path_of, replace_tokenizer
from pause_megatron.data.corpus.records import AdoptionRecord, Counts, TokenizerRecord
from pause_megatron.data.corpus.side_writing import carried_sides, remove_sides
from pause_megatron.data.prepare.publish import remove_partial_files
from pause_megatron.data.tokenizer.tokenizer import DESCRIPTION_NAME, Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import only_writer
from pause_megatron.terminal.progress import Report, no_report

MissingEod = Literal["error", "keep"]
"""What to do with documents that do not end with EOD: stop with an error, or keep and count them."""

_PREPARE = "prepare the texts with `pause-megatron prepare`"


@dataclass(frozen=True)
class Adopted:
    """The result of `adopt`.

    Attributes:
        manifest: Manifest of the corpus.
        agreement: Agreement of a sample with the tokenizer; None if the corpus had been adopted with it before.
        seconds: Wall-clock time.
        special: Number of occurrences by special token, without EOD and pauses.
    """

    manifest: CorpusManifest
    agreement: Agreement | None
    seconds: float
    special: Mapping[str, int] = field(default_factory=dict)


def adopt(
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    missing_eod: MissingEod = "error",
    min_agreement: float | None = None,
    overwrite: bool = False,
    report: Report = no_report,
) -> Adopted:
    """Check a corpus of Megatron-LM's preprocess_data.py, or of another program, and write its manifest.

    Args:
        prefix: Path of the `.bin` and `.idx` without the extensions.
        tokenizer: Tokenizer that encoded the corpus, with its EOD and pause ids.
        missing_eod: Whether documents that do not end with EOD are an error, or kept and counted.
        min_agreement: Minimal fraction of the ids of sampled documents that decoding and encoding must reproduce;
            None for `Agreement.needed`.
        overwrite: Replace a manifest of another tokenizer or of `prepare`.
        report: Progress callback of the reading.

    Returns:
        The manifest, and what the checks found.

    Raises:
        DataError: The files are not a complete corpus of text of this tokenizer without pauses; there is another
            manifest; or another process works on the corpus.
    """
    begun = time.perf_counter()
    _check_there(prefix)
    try:
        with only_writer(path_of(prefix, "lock"), f"corpus {prefix}"):
            if not overwrite and (manifest := _adopted_before(prefix, tokenizer)):
                return Adopted(manifest, None, time.perf_counter() - begun)
            _clear_place(prefix)
            before = _stamps(prefix)
            header = _check_index(prefix, report)
            agreement = _check_sample(prefix, tokenizer, header, missing_eod, min_agreement)
            found = scan(prefix, header, tokenizer, report)
            _check_ids(prefix, tokenizer, found, missing_eod)
            manifest = _manifest(prefix, tokenizer, header, found, agreement, report)
            if _stamps(prefix) != before:
                raise DataError(f"{prefix}: its .bin or .idx was modified during the scan; adopt it once complete")
            manifest, foreign = carried_sides(prefix, manifest)
            replace_tokenizer(prefix, tokenizer)
            manifest.save(prefix)
            remove_sides(foreign)
    except OSError as error:
        raise DataError(_write_error(prefix, error)) from None
    special = {tokenizer.token_of(token) or str(token): count for token, count in found.special.items()}
    return Adopted(manifest, agreement, time.perf_counter() - begun, special)


def _check_there(prefix: str | Path) -> None:
    for name in ("bin", "idx"):
        path = path_of(prefix, name)
        if path.is_file():
            continue
        known = sorted(Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}*.{name}"))
        if Path(prefix).suffix in (".bin", ".idx") and Path(prefix).is_file():
            known = [Path(prefix)]
        hint = f"; did you mean {known[0].with_suffix('')}?" if known else ""
        if name == "idx" and not known:
            hint = "; preprocess_data.py writes it at its end, so it has not finished"
        raise DataError(f"{path}: expected the .{name} file of a corpus, got no such file{hint}")


def _adopted_before(prefix: str | Path, tokenizer: Tokenizer) -> CorpusManifest | None:
    """Return the manifest of a corpus that was adopted with this tokenizer, None if there is no manifest."""
    if not path_of(prefix, "manifest.json").exists():
        return None
    manifest = CorpusManifest.load(prefix)
    if manifest.adoption is not None and manifest.tokenizer == TokenizerRecord.of(tokenizer):
        open_corpus(prefix)
        return manifest
    verb = "prepared" if manifest.adoption is None else "adopted"
    raise DataError(
        f"corpus {prefix}: expected no manifest or one of {TokenizerRecord.of(tokenizer)}, got a corpus that was "
        f"{verb} with {manifest.tokenizer}; replace its manifest with --overwrite"
    )


def _clear_place(prefix: str | Path) -> None:
    """Remove the temporary files of a killed run, unless files of another program are in the way."""
    parts, kept = path_of(prefix, "parts"), path_of(prefix, "tokenizer")
    if parts.exists():
        raise DataError(f"{parts}: expected no such folder, got an unfinished preparation: finish or remove it")
    if kept.exists() and not (kept / DESCRIPTION_NAME).is_file():
        raise DataError(
            f"{kept}: expected the corpus's tokenizer or no such folder, got one of another program; rename it"
        )
    remove_partial_files(prefix, parts)


def _check_index(prefix: str | Path, report: Report) -> IndexHeader:
    idx_path, bin_path = path_of(prefix, "idx"), path_of(prefix, "bin")
    header = read_header(idx_path)
    if not header.bin_bytes:
        raise DataError(f"{idx_path}: expected documents, got none with a token")
    size = bin_path.stat().st_size
    if size != header.bin_bytes:
        raise DataError(
            f"{bin_path}: expected {header.bin_bytes:,} bytes, the size in {idx_path.name}, got {size:,}: it was "
            "truncated or overwritten, or preprocess_data.py has not finished. Copy or regenerate it"
        )
    done, total = 0, idx_path.stat().st_size

    def on_read(read: int) -> None:
        nonlocal done
        done += read
        report(f"check {idx_path.name}", done, total)

    check_entries(idx_path, header, on_read)
    return header


def _check_sample(
    prefix: str | Path,
    tokenizer: Tokenizer,
    header: IndexHeader,
    missing_eod: MissingEod,
    min_agreement: float | None,
) -> Agreement:
    """Check the tokenizer and its EOD on a sample, before the corpus is read whole."""
    sample = sample_documents(prefix, header)
    size = tokenizer.vocab_size
    for document in sample:
        ids = np.append(document.ids, document.last)
        outside = ids[(ids < 0) | (ids >= size)]
        if outside.size:
            raise DataError(
                f"{prefix}.bin: document {document.number:,}: expected ids 0 to {size - 1:,} of the tokenizer, got "
                f"{outside[0]:,}.{_outside_hint(tokenizer, sample)}"
            )
    ended = sum(document.last == tokenizer.eod for document in sample)
    if missing_eod == "error" and ended < len(sample) / 2:
        raise DataError(
            f"{prefix}.bin: expected EOD {_named(tokenizer, tokenizer.eod)} at the end of each document, got it in "
            f"{ended:,} of {len(sample):,} sampled documents.{_missing_eod_hint(tokenizer, sample)}"
        )
    agreement = agreement_of(tokenizer, sample)
    needed = agreement.needed if min_agreement is None else min_agreement
    if agreement.share < needed:
        raise DataError(
            f"{prefix}.bin: expected {needed:.1%} or more of the ids of {len(sample):,} sampled documents to be "
            f"reproduced by decoding and encoding, got {agreement.share:.1%} ({agreement.by_chance:.1%} by chance): "
            f"the corpus was encoded with a different tokenizer. Decoded with this one, it starts: {agreement.text!r}. "
            "If that reads well, lower --min-agreement"
        )
    return agreement


def _outside_hint(tokenizer: Tokenizer, sample: list[SampledDocument]) -> str:
    end, share = most_common_end(sample)
    if share > 0.5 and end >= tokenizer.vocab_size:
        return (
            f" {share:.0%} of the sampled documents end with {end:,}: an EOD that the tokenizer's file does not have. "
            "Megatron-LM's legacy tokenizers (--legacy-tokenizer, and releases before core_v0.16) add one after the "
            f"vocabulary. Preprocess again without it, or {_PREPARE}"
        )
    return " Another tokenizer encoded it, or one with added tokens; name that one with --tokenizer"


def _missing_eod_hint(tokenizer: Tokenizer, sample: list[SampledDocument]) -> str:
    end, share = most_common_end(sample)
    if share > 0.5 and not tokenizer.reachable(end):  # a full stop is no EOD
        token = tokenizer.token_of(end)
        return f" {share:.0%} end with {_named(tokenizer, end)}: if that is the EOD, give --eod-token {token!r}"
    return (
        " preprocess_data.py writes it only with --append-eod; without it a model does not learn where a text ends. "
        f"Preprocess again, or {_PREPARE}, or keep these documents with --missing-eod keep"
    )


def _named(tokenizer: Tokenizer, token_id: int) -> str:
    return f"{token_id} ({tokenizer.token_of(token_id)!r})"


def _check_ids(prefix: str | Path, tokenizer: Tokenizer, found: Scan, missing_eod: MissingEod) -> None:
    """Raise one error for everything that the scan found."""
    faults = []
    if found.outside.ids is not None:
        low, high = found.outside.ids
        faults.append(
            f"{found.outside.count:,} ids outside the tokenizer's 0 to {tokenizer.vocab_size - 1:,}, from {low:,} to "
            f"{high:,}: {found.outside}. Another tokenizer encoded it, or one with added tokens; name that one with "
            "--tokenizer"
        )
    if found.pauses.count:
        faults.append(
            f"the pause id {_named(tokenizer, tokenizer.pause_id)} {found.pauses.count:,} times: {found.pauses}. Texts "
            "that spell it were encoded as the special token, and a run would use these ids as pauses. Choose another "
            f"id, for example --pause-id {tokenizer.vocab_size}, the first one after the vocabulary, or {_PREPARE}, "
            "which encodes such text as text"
        )
    if found.without_eod.count and missing_eod == "error":
        faults.append(
            f"{found.without_eod.count:,} documents that do not end with EOD {_named(tokenizer, tokenizer.eod)}: "
            f"{found.without_eod} (their last tokens). A model does not learn where these end; keep them with "
            f"--missing-eod keep, or {_PREPARE}"
        )
    if faults:
        raise DataError(f"{prefix}.bin: expected text of the tokenizer, got:\n  " + "\n  ".join(faults))


def _manifest(
    prefix: str | Path,
    tokenizer: Tokenizer,
    header: IndexHeader,
    found: Scan,
    agreement: Agreement,
    report: Report,
) -> CorpusManifest:
    return CorpusManifest(
        tokenizer=TokenizerRecord.of(tokenizer),
        text_key=None,
        damaged_shards=None,
        dtype=header.dtype,
        counts=Counts(documents=header.documents, tokens=found.tokens, text_bytes=None, malformed={}),
        places={},
        files={
            "bin": found.file,
            "idx": digest_file(path_of(prefix, "idx"), f"digest of {Path(prefix).name}.idx", report),
        },
        blocks=found.blocks,
        sources=[],
        adoption=AdoptionRecord(
            agreement=agreement.share,
            sampled=agreement.documents,
            eod=found.eod,
            without_eod=found.without_eod.count,
            free_pause_ids=found.free_pause_ids,
        ),
    )


def _stamps(prefix: str | Path) -> list[tuple[int, int, int]]:
    found = [os.stat(path_of(prefix, name)) for name in ("bin", "idx")]
    return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def _write_error(prefix: str | Path, error: OSError) -> str:
    message = f"{error.filename or prefix}: {os.strerror(error.errno or 0)}"
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{message}; resolve this and run the same command again"
    folder, name = Path(prefix).parent.absolute(), Path(prefix).name
    return (
        f"{message}. The manifest is written beside the corpus: create links in a folder of yours (`ln -s "
        f"{folder}/{name}.bin {folder}/{name}.idx .`) and adopt those"
    )
