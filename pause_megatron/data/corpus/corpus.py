"""A tokenized corpus, opened with all checks that take constant time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from pause_megatron.data.corpus.index_file import read_header
from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.data.corpus.records import BlockRecord, FileName, FileRecord, TokenizerRecord
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """A corpus that passed the constant-time checks of `open_corpus`.

    Attributes:
        prefix: Path of its files without the extensions.
        manifest: Its manifest.
        tokenizer: The tokenizer that is saved beside it.
    """

    prefix: str
    manifest: CorpusManifest
    tokenizer: Tokenizer

    @property
    def title(self) -> str:
        """What it is, for messages."""
        return f"corpus {self.prefix}"

    @property
    def label(self) -> str:
        """Its short name, for progress."""
        return Path(self.prefix).name

    @property
    def files(self) -> dict[str, FileRecord]:
        """Size and digest of `.bin` and `.idx` by extension."""
        return {name: record for name, record in self.manifest.files.items()}

    @property
    def blocks(self) -> dict[str, BlockRecord]:
        """Digests of the blocks of the `.bin`; empty where the manifest has none."""
        return {} if self.manifest.blocks is None else {"bin": self.manifest.blocks}

    @property
    def remedy(self) -> str:
        """What to do if it is damaged."""
        return f"copy it again, or {self.manifest.made_by} it with --overwrite"


def open_corpus(prefix: str | Path, tokenizer: Tokenizer | str | Path | None = None) -> Corpus:
    """Open a corpus after checking, in constant time, that its files belong together.

    Args:
        prefix: Path of `.bin`, `.idx`, `.manifest.json` and `.tokenizer/` without the extensions.
        tokenizer: The tokenizer that the corpus must have; None for the one saved beside it.

    Returns:
        The opened corpus. `verify_corpus` reads it whole.

    Raises:
        DataError: The corpus is unfinished, truncated, without a manifest, made of files of several corpora, or
            tokenized with another tokenizer.
    """
    manifest = CorpusManifest.load(prefix)
    _check_files(prefix, manifest)
    kept = load_tokenizer(path_of(prefix, "tokenizer"))
    if tokenizer is not None:
        given = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        if given.fingerprint != manifest.tokenizer.fingerprint:
            raise DataError(
                f"corpus {prefix}: expected its tokenizer {manifest.tokenizer.fingerprint} "
                f"({manifest.tokenizer.vocab_size:,} ids), got {given.fingerprint} ({given.vocab_size:,} ids): leave "
                "data.tokenizer out to use the corpus's own, or prepare it again"
            )
    if TokenizerRecord.of(kept) != manifest.tokenizer:
        raise DataError(
            f"{path_of(prefix, 'tokenizer')}: expected the corpus's tokenizer {manifest.tokenizer}, got "
            f"{TokenizerRecord.of(kept)}"
        )
    return Corpus(str(prefix), manifest, kept)


def require_one_tokenizer(corpora: Sequence[Corpus]) -> Tokenizer:
    """Return the tokenizer that all corpora of a blend share.

    Args:
        corpora: The corpora, at least one.

    Raises:
        DataError: Two tokenizers differ, in their content, EOD or pause id.
    """
    first = corpora[0]
    for other in corpora[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise DataError(
                f"corpora {first.prefix} and {other.prefix} cannot be blended: expected tokenizer "
                f"{first.manifest.tokenizer}, got {other.manifest.tokenizer}"
            )
    return first.tokenizer


def _check_files(prefix: str | Path, manifest: CorpusManifest) -> None:
    bin_path, idx_path = path_of(prefix, "bin"), path_of(prefix, "idx")
    sizes: dict[FileName, int] = {}
    for name in get_args(FileName):
        path = path_of(prefix, name)
        if not path.is_file():
            raise DataError(f"{path}: expected the .{name} of {path_of(prefix, 'manifest.json')}, got no such file")
        sizes[name] = path.stat().st_size
    header = read_header(idx_path)
    if sizes["bin"] != header.bin_bytes:
        raise DataError(
            f"{bin_path}: expected {header.bin_bytes:,} bytes, the size in {idx_path.name}, got {sizes['bin']:,}: it "
            f"was truncated or overwritten. Copy it again, or {manifest.made_by} it with --overwrite"
        )
    for name, size in sizes.items():
        if size != manifest.files[name].bytes:
            raise DataError(
                f"{path_of(prefix, name)}: expected {manifest.files[name].bytes:,} bytes, the size in the manifest, "
                f"got {size:,}: the files are of different corpora"
            )
    if manifest.counts.tokens * np.dtype(manifest.dtype).itemsize != sizes["bin"]:
        raise DataError(
            f"{bin_path}: expected {manifest.counts.tokens:,} tokens of {manifest.dtype}, as in the manifest, got "
            f"{sizes['bin']:,} bytes: the files are of different corpora"
        )
    if (header.dtype, header.documents) != (manifest.dtype, manifest.counts.documents):
        raise DataError(
            f"{idx_path}: expected {manifest.counts.documents:,} documents of {manifest.dtype}, as in the manifest, "
            f"got {header.documents:,} of {header.dtype}: the files are of different corpora"
        )
