"""Opening a prepared corpus with every check that takes constant time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import read_header
from pause_megatron.data.corpus.manifest import Manifest, TokenizerRecord, path_of
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus that passed the constant-time checks. `verify.damage_of` reads it whole."""

    prefix: str
    manifest: Manifest
    tokenizer: Tokenizer


def open_corpus(prefix: str | Path, tokenizer: Tokenizer | str | Path | None = None) -> Corpus:
    """Open a prepared corpus after checking, in constant time, that its files belong together.

    Args:
        prefix: of `.bin`, `.idx`, `.manifest.json` and `.tokenizer/`.
        tokenizer: one to insist on; default: the one kept beside the corpus.

    Raises:
        DataError: unfinished, foreign, truncated, mixed up, or prepared with another tokenizer.
    """
    manifest = Manifest.load(prefix)
    _check_files(prefix, manifest)
    kept = load_tokenizer(path_of(prefix, "tokenizer"))
    if tokenizer is not None:
        given = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        if given.fingerprint != manifest.tokenizer.fingerprint:
            raise DataError(
                f"corpus {prefix} was prepared with tokenizer {manifest.tokenizer.fingerprint} "
                f"({manifest.tokenizer.vocab_size:,} ids), but the one given is {given.fingerprint} "
                f"({given.vocab_size:,} ids): leave data.tokenizer out to use the corpus's own, or prepare it again"
            )
    if TokenizerRecord.of(kept) != manifest.tokenizer:
        raise DataError(
            f"{path_of(prefix, 'tokenizer')} is not the tokenizer that the corpus was prepared with: expected "
            f"{manifest.tokenizer}, came {TokenizerRecord.of(kept)}"
        )
    return Corpus(str(prefix), manifest, kept)


def require_one_tokenizer(corpora: Sequence[Corpus]) -> Tokenizer:
    """The tokenizer that all corpora of a blend share, EOD and pause id included.

    Raises:
        DataError: two of them differ.
    """
    first = corpora[0]
    for other in corpora[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise DataError(
                f"corpora {first.prefix} and {other.prefix} cannot be blended, their tokenizers differ: "
                f"{first.manifest.tokenizer} and {other.manifest.tokenizer}"
            )
    return first.tokenizer


def _check_files(prefix: str | Path, manifest: Manifest) -> None:
    sizes = {}
    for name in ("bin", "idx"):
        path = path_of(prefix, name)
        if not path.is_file():
            raise DataError(f"{path} is missing, though {path_of(prefix, 'manifest.json')} is there")
        sizes[name] = path.stat().st_size
    header = read_header(path_of(prefix, "idx"))
    bin_path, idx_path = path_of(prefix, "bin"), path_of(prefix, "idx")
    if sizes["bin"] != header.bin_bytes:
        relation = "shorter" if sizes["bin"] < header.bin_bytes else "longer"
        raise DataError(
            f"{bin_path} is {relation} than its index says: {idx_path.name} needs {header.bin_bytes:,} bytes, the file "
            f"has {sizes['bin']:,}; it was cut or overwritten. Copy it again, or {manifest.made_by} it with --overwrite"
        )
    for name, size in sizes.items():
        if size != manifest.files[name].bytes:
            raise DataError(
                f"{path_of(prefix, name)}: {size:,} bytes, but its manifest says {manifest.files[name].bytes:,}: the "
                "files are of different corpora"
            )
    if manifest.counts.tokens * np.dtype(manifest.dtype).itemsize != sizes["bin"]:
        raise DataError(
            f"{bin_path}: {sizes['bin']:,} bytes, but its manifest says {manifest.counts.tokens:,} tokens of "
            f"{manifest.dtype}: the files are of different corpora"
        )
    if (header.dtype, header.documents) != (manifest.dtype, manifest.counts.documents):
        raise DataError(
            f"{idx_path}: {header.documents:,} documents of {header.dtype}, but its manifest says "
            f"{manifest.counts.documents:,} of {manifest.dtype}: the files are of different corpora"
        )
