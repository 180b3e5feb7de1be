"""The manifest of a tokenized corpus: tokenizer, sources, counts and digests.

`PREFIX.manifest.json` is written last and marks a complete corpus. It contains a digest of itself, so that an edited
or damaged manifest is detected.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pause_megatron.data.corpus.records import (
    AdoptionRecord,
    BlockRecord,
    CorpusSpec,
    Counts,
    FileName,
    FileRecord,
    FrozenModel,
    SideRecord,
    SourceRecord,
    TokenizerRecord,
    read_record,
)
from pause_megatron.data.text.documents import LineLocation
from pause_megatron.data.text.sources import DamagedShards
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.files.durable import write_whole

MANIFEST_VERSION: Literal[3] = 3
SIDES_VERSION: Literal[4] = 4
"""Version of a manifest with side arrays, which earlier programs refuse. Without them it has an earlier version."""

TEMPORARY_FOLDERS = ("tokenizer.tmp", "tokenizer.old.tmp")
"""Extensions of the folders that a killed `replace_tokenizer` leaves."""


class CorpusManifest(FrozenModel):
    """The content of `PREFIX.manifest.json`, without the digest over it that the file ends with.

    Attributes:
        version: Format version. 1 has neither blocks nor a digest of the manifest, 2 no adoption, 3 no side arrays;
            all can be read. Blocks are absent too where side arrays were added to a manifest of version 1.
        tokenizer: The tokenizer with its EOD and pause ids.
        text_key: Option of `prepare`; None for an adopted corpus.
        damaged_shards: Option of `prepare`; None for an adopted corpus.
        dtype: Data type of the ids in `.bin`; `prepare` writes "uint16" or "int32".
        counts: Sums over all documents.
        places: The first locations of malformed lines by kind.
        files: Size and digest of the "bin" and the "idx".
        blocks: Digests of the blocks of the `.bin`; None in version 1.
        sources: The sources in order; empty for an adopted corpus.
        adoption: What `adopt` found; None for a corpus that `prepare` wrote.
        sides: The side arrays by name, in order of their names; without effect on the fingerprint.
    """

    version: Literal[1, 2, 3, 4] = MANIFEST_VERSION
    tokenizer: TokenizerRecord
    text_key: str | None
    damaged_shards: DamagedShards | None
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]
    counts: Counts
    places: dict[str, list[LineLocation]]
    files: dict[FileName, FileRecord]
    blocks: BlockRecord | None
    sources: list[SourceRecord]
    adoption: AdoptionRecord | None
    sides: dict[str, SideRecord] = Field(default_factory=dict)

    @property
    def made_by(self) -> Literal["prepare", "adopt"]:
        """The verb that wrote this manifest, and rewrites it with --overwrite."""
        return "prepare" if self.adoption is None else "adopt"

    @property
    def eod_count(self) -> int:
        """Number of EODs in the corpus: one per document if `prepare` wrote it."""
        return self.counts.documents if self.adoption is None else self.adoption.eod

    @property
    def without_eod(self) -> int:
        """Number of documents that do not end with EOD: none if `prepare` wrote the corpus."""
        return 0 if self.adoption is None else self.adoption.without_eod

    @property
    def spec(self) -> CorpusSpec | None:
        """The spec of a corpus that `prepare` wrote; None for an adopted corpus."""
        if self.text_key is None or self.damaged_shards is None:
            return None
        return CorpusSpec(
            tokenizer=self.tokenizer,
            text_key=self.text_key,
            damaged_shards=self.damaged_shards,
            sources=[source.identity for source in self.sources],
        )

    @property
    def fingerprint(self) -> str:
        """The digests of `.bin` and `.idx` and the tokenizer's fingerprint, EOD and pause id, as one string."""
        record = self.tokenizer
        return "/".join(
            [
                self.files["bin"].digest,
                self.files["idx"].digest,
                record.fingerprint,
                f"eod{record.eod}",
                f"pause{record.pause_id}",
            ]
        )

    def with_sides(self, sides: Mapping[str, SideRecord]) -> CorpusManifest:
        """Return this manifest with these side arrays, in the version that holds them.

        Args:
            sides: The side arrays by name; empty for none.
        """
        plain: Literal[1, 3] = MANIFEST_VERSION if self.blocks is not None else 1
        version = SIDES_VERSION if sides else self.version if self.version < SIDES_VERSION else plain
        return self.model_copy(update={"version": version, "sides": dict(sorted(sides.items()))})

    def save(self, prefix: str | Path) -> None:
        """Write `PREFIX.manifest.json` atomically."""
        content = {**self._content(), "digest": self._digest()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_whole(path_of(prefix, "manifest.json"), (text + "\n").encode())

    @classmethod
    def load(cls, prefix: str | Path) -> CorpusManifest:
        """Read `PREFIX.manifest.json`.

        Raises:
            DataError: The manifest is missing, unreadable, invalid, of an unknown version, or edited.
        """
        path = path_of(prefix, "manifest.json")
        if not path.is_file():
            raise DataError(_missing_manifest(prefix))
        file = read_record(path, _ManifestFile)
        manifest = cls(**{name: getattr(file, name) for name in cls.model_fields})
        if (
            file.digest != manifest._digest()
            or (manifest.version == 1 and manifest.blocks is not None)
            or (manifest.version in (2, 3) and manifest.blocks is None)
            or (manifest.version < 3 and manifest.adoption is not None)
            or (manifest.version == SIDES_VERSION) != bool(manifest.sides)
        ):
            raise DataError(
                f"{path}: expected digest {manifest._digest()}, got {file.digest}: edited or damaged after it was "
                f"written. Copy it again, or {manifest.made_by} the corpus again with --overwrite"
            )
        return manifest

    def _digest(self) -> str | None:
        if self.version == 1:
            return None
        content = self._content()
        if self.version < 3:
            del content["adoption"]
        return bytes_digest(json.dumps(content, sort_keys=True).encode())

    def _content(self) -> dict[str, Any]:
        # Without side arrays a manifest has the bytes that it had before there were any.
        return self.model_dump(mode="json", exclude=set() if self.sides else {"sides"})


class _ManifestFile(CorpusManifest):
    blocks: BlockRecord | None = None
    adoption: AdoptionRecord | None = None
    digest: str | None = None


def path_of(prefix: str | Path, extension: str) -> Path:
    """Return the path PREFIX.EXTENSION.

    Args:
        prefix: Path of a corpus without the extensions; it may contain dots.
        extension: Extension without a leading dot, such as "bin" or "manifest.json".
    """
    return Path(f"{prefix}.{extension}")


def replace_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Replace PREFIX.tokenizer/ by a tokenizer, after removing an older manifest.

    Args:
        prefix: PREFIX of the corpus.
        tokenizer: Tokenizer to save.
    """
    folder = path_of(prefix, "tokenizer")
    partial, old = (path_of(prefix, extension) for extension in TEMPORARY_FOLDERS)
    tokenizer.save(partial)
    path_of(prefix, "manifest.json").unlink(missing_ok=True)
    if folder.exists():  # renamed atomically: a half-removed folder would look like one of another program
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _missing_manifest(prefix: str | Path) -> str:
    expected = path_of(prefix, "manifest.json")
    if path_of(prefix, "parts").is_dir():
        return (
            f"corpus {prefix}: expected {expected}, got an unfinished preparation; run the same `prepare` command "
            "again to resume it"
        )
    if path_of(prefix, "bin").exists():
        return (
            f"corpus {prefix}: expected {expected}, got a .bin without a manifest: it was not made by `pause-megatron "
            "prepare`, or its preparation did not finish. Its tokenizer and its completeness are unknown. If it is of "
            f"Megatron-LM's preprocess_data.py, `pause-megatron adopt {prefix} --tokenizer T` checks it and writes one"
        )
    return f"no corpus at {prefix}: expected {expected}, which is written by `pause-megatron prepare --output {prefix}`"
