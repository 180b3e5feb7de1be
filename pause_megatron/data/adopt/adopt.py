"""`.bin` and `.idx` that others wrote -> PREFIX.tokenizer/ and, last, PREFIX.manifest.json, as of a prepared corpus.

The two files are read and never written to. Until the manifest appears nothing else sees a corpus, so a run that is
killed leaves nothing to tidy, and the same command begins anew.
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

from pause_megatron.data.adopt.scan import Scan, digested, scan
from pause_megatron.data.adopt.tokenizer_check import (
    Agreement,
    SampledDocument,
    agreement_of,
    most_common_end,
    sample_documents,
)
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.index_file import IndexHeader, check_entries, read_header
from pause_megatron.data.corpus.manifest import (
    AdoptionRecord,
    Counts,
    Manifest,
    TokenizerRecord,
    path_of,
    replace_tokenizer,
)
from pause_megatron.data.corpus.verify import Report, no_report
from pause_megatron.data.prepare.publish import remove_partial_files
from pause_megatron.data.tokenizer.tokenizer import DESCRIPTION_NAME, Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import only_writer

_PREPARE = "prepare the texts with `pause-megatron prepare`"


@dataclass(frozen=True)
class Adopted:
    """Result of `adopt`.

    Attributes:
        manifest: of the corpus.
        agreement: of a sample with the tokenizer; None where the corpus had been adopted so before.
        seconds: wall-clock time.
        special: how often each special token stands in the corpus that is neither EOD nor pause.
    """

    manifest: Manifest
    agreement: Agreement | None
    seconds: float
    special: Mapping[str, int] = field(default_factory=dict)


def adopt(
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    missing_eod: Literal["error", "keep"] = "error",
    min_agreement: float | None = None,
    overwrite: bool = False,
    report: Report = no_report,
) -> Adopted:
    """Check a corpus of Megatron-LM's preprocess_data.py, or of anybody else, and write its manifest.

    Args:
        prefix: of the `.bin` and `.idx`.
        tokenizer: that they were made with, with its EOD and pause ids.
        missing_eod: whether documents that do not end with EOD are refused, or kept and counted.
        min_agreement: share of the ids of sampled documents that decoding and encoding must give back; default: see
            `Agreement.needed`.
        overwrite: replace a manifest that says otherwise.
        report: of the reading.

    Raises:
        DataError: not a whole corpus of text of this tokenizer without pauses; or another manifest, or another process,
            in the place.
    """
    begun = time.perf_counter()
    _check_there(prefix)
    try:
        with only_writer(path_of(prefix, "lock"), f"corpus {prefix}"):
            if not overwrite and (manifest := _adopted_before(prefix, tokenizer)):
                return Adopted(manifest, None, time.perf_counter() - begun)
            _check_place(prefix)
            before = _stamps(prefix)
            header = _checked_index(prefix, report)
            sample = sample_documents(prefix, header)
            agreement = _checked_sample(prefix, tokenizer, sample, missing_eod, min_agreement)
            found = scan(prefix, header, tokenizer, report)
            _refuse(prefix, tokenizer, found, missing_eod)
            manifest = _manifest(prefix, tokenizer, header, found, agreement, report)
            if _stamps(prefix) != before:
                raise DataError(f"{prefix}.bin or .idx was written to while it was read; adopt it once that is over")
            replace_tokenizer(prefix, tokenizer)
            manifest.save(prefix)
    except OSError as error:
        raise DataError(_why_not(prefix, error)) from None
    special = {tokenizer.token_of(token): count for token, count in found.special.items()}
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
            hint = "; preprocess_data.py writes it when it is done, so it has not finished"
        raise DataError(f"{path}: expected the .{name} file of a corpus, got no such file{hint}")


def _adopted_before(prefix: str | Path, tokenizer: Tokenizer) -> Manifest | None:
    """The manifest of a corpus that was adopted with this tokenizer, None where there is no manifest."""
    if not path_of(prefix, "manifest.json").exists():
        return None
    manifest = Manifest.load(prefix)
    if manifest.adoption is not None and manifest.tokenizer == TokenizerRecord.of(tokenizer):
        open_corpus(prefix)
        return manifest
    made = "made by `pause-megatron prepare`" if manifest.adoption is None else "adopted"
    raise DataError(
        f"corpus {prefix} has a manifest already, {made} with {manifest.tokenizer}; to replace it with "
        f"{TokenizerRecord.of(tokenizer)}, give --overwrite"
    )


def _check_place(prefix: str | Path) -> None:
    parts, kept = path_of(prefix, "parts"), path_of(prefix, "tokenizer")
    if parts.exists():
        raise DataError(f"an unfinished preparation is at {parts}: finish it, or remove that folder")
    if kept.exists() and not (kept / DESCRIPTION_NAME).is_file():
        raise DataError(
            f"{kept} is in the place of the corpus's tokenizer, and not written by this program; give it another name"
        )
    remove_partial_files(prefix, parts)


def _checked_index(prefix: str | Path, report: Report) -> IndexHeader:
    idx_path, bin_path = path_of(prefix, "idx"), path_of(prefix, "bin")
    header = read_header(idx_path)
    if not header.bin_bytes:
        raise DataError(f"{idx_path}: expected documents, got none with a token in it")
    size = bin_path.stat().st_size
    if size != header.bin_bytes:
        raise DataError(
            f"{bin_path}: expected {header.bin_bytes:,} bytes, which {idx_path.name} says, got {size:,}: it was cut or "
            "overwritten, or its writer has not finished. Copy it again, or make it again"
        )
    done, total = 0, idx_path.stat().st_size

    def on_read(read: int) -> None:
        nonlocal done
        done += read
        report(f"check {idx_path.name}", done, total)

    check_entries(idx_path, header, on_read)
    return header


def _checked_sample(
    prefix: str | Path,
    tokenizer: Tokenizer,
    sample: list[SampledDocument],
    missing_eod: Literal["error", "keep"],
    min_agreement: float | None,
) -> Agreement:
    """Refuses a wrong tokenizer and a wrong EOD before all of the corpus is read."""
    size = tokenizer.vocab_size
    for document in sample:
        outside = document.ids[(document.ids < 0) | (document.ids >= size)]
        outside = outside if outside.size else [i for i in [document.last] if not 0 <= i < size]
        if len(outside):
            raise DataError(
                f"{prefix}.bin: document {document.number:,}: expected ids 0 to {size - 1:,} of the tokenizer, got "
                f"{outside[0]:,}.{_why_outside(tokenizer, sample)}"
            )
    ended = sum(document.last == tokenizer.eod for document in sample)
    if missing_eod == "error" and ended < len(sample) / 2:
        raise DataError(
            f"{prefix}.bin: expected EOD {_named(tokenizer, tokenizer.eod)} at the end of each document, got it in "
            f"{ended:,} of {len(sample):,} sampled documents.{_why_no_eod(tokenizer, sample)}"
        )
    agreement = agreement_of(tokenizer, sample)
    needed = agreement.needed if min_agreement is None else min_agreement
    if agreement.share < needed:
        raise DataError(
            f"{prefix}.bin: expected {needed:.1%} or more of the ids of {len(sample):,} sampled documents to come back "
            f"when their text is encoded again, got {agreement.share:.1%} ({agreement.by_chance:.1%} by chance): "
            f"another tokenizer made it. With this one it begins: {agreement.text!r}. If that reads well, lower "
            "--min-agreement"
        )
    return agreement


def _why_outside(tokenizer: Tokenizer, sample: list[SampledDocument]) -> str:
    end, share = most_common_end(sample)
    if share > 0.5 and end >= tokenizer.vocab_size:
        return (
            f" {share:.0%} of the sampled documents end with {end:,}: an EOD that the tokenizer's file does not have, "
            "as Megatron-LM's legacy tokenizers (--legacy-tokenizer, and releases before core_v0.16) add behind the "
            f"vocabulary. Preprocess again without it, or {_PREPARE}"
        )
    return " Another tokenizer made it, or one with tokens added; name that one with --tokenizer"


def _why_no_eod(tokenizer: Tokenizer, sample: list[SampledDocument]) -> str:
    end, share = most_common_end(sample)
    if share > 0.5 and not tokenizer.reachable(end):  # a full stop is no EOD
        token = tokenizer.token_of(end)
        return f" {share:.0%} end with {_named(tokenizer, end)}: if that is the EOD, give --eod-token {token!r}"
    return (
        " preprocess_data.py writes it with --append-eod only; without it a model never learns where a text ends. "
        f"Preprocess again, or {_PREPARE}, or take it as it is with --missing-eod keep"
    )


def _named(tokenizer: Tokenizer, token_id: int) -> str:
    return f"{token_id} ({tokenizer.token_of(token_id)!r})"


def _refuse(prefix: str | Path, tokenizer: Tokenizer, found: Scan, missing_eod: Literal["error", "keep"]) -> None:
    """Raises one error for all that was found."""
    faults = []
    if found.outside.count:
        low, high = found.outside.ids
        faults.append(
            f"{found.outside.count:,} ids outside the tokenizer's 0 to {tokenizer.vocab_size - 1:,}, from {low:,} to "
            f"{high:,}: {found.outside}. Another tokenizer made it, or one with tokens added; name that one with "
            "--tokenizer"
        )
    if found.pauses.count:
        faults.append(
            f"the pause id {_named(tokenizer, tokenizer.pause_id)} {found.pauses.count:,} times: {found.pauses}. A run "
            "would take these for pauses. Texts that spell it were encoded as the special token; choose another id, "
            f"for example --pause-id {tokenizer.vocab_size}, the first one behind the vocabulary, or {_PREPARE}, which "
            "keeps such text as text"
        )
    if found.without_eod.count and missing_eod == "error":
        faults.append(
            f"{found.without_eod.count:,} documents that do not end with EOD {_named(tokenizer, tokenizer.eod)}: "
            f"{found.without_eod} (their last tokens). A model does not see where these end; take them as they are "
            f"with --missing-eod keep, or {_PREPARE}"
        )
    if faults:
        raise DataError(f"{prefix}.bin cannot be adopted:\n  " + "\n  ".join(faults))


def _manifest(
    prefix: str | Path,
    tokenizer: Tokenizer,
    header: IndexHeader,
    found: Scan,
    agreement: Agreement,
    report: Report,
) -> Manifest:
    return Manifest(
        tokenizer=TokenizerRecord.of(tokenizer),
        text_key=None,
        damaged_shards=None,
        dtype=header.dtype,
        counts=Counts(documents=header.documents, tokens=found.tokens, text_bytes=None, malformed={}),
        places={},
        files={
            "bin": found.file,
            "idx": digested(path_of(prefix, "idx"), f"digest of {Path(prefix).name}.idx", report),
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


def _why_not(prefix: str | Path, error: OSError) -> str:
    said = f"{error.filename or prefix}: {os.strerror(error.errno or 0)}"
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{said}; mend it and run the same command again"
    folder, name = Path(prefix).parent.absolute(), Path(prefix).name
    return (
        f"{said}. The manifest lies beside the corpus: make links in a folder of yours (`ln -s {folder}/{name}.bin "
        f"{folder}/{name}.idx .`) and adopt those"
    )
