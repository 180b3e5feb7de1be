"""What a prepared corpus is and was made of.

`PREFIX.manifest.json` appears last and is the mark of a complete corpus. It carries a digest of itself, so that an
edited or damaged manifest is told from the one that `prepare` or `adopt` wrote.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pause_megatron.data.text.documents import Place
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import write_whole

MANIFEST_VERSION = 3
BLOCK_BYTES = 64 << 20
TEMPORARY_FOLDERS = ("tokenizer.tmp", "tokenizer.old.tmp")
"""Extensions of what a killed `replace_tokenizer` leaves."""


class Record(BaseModel):
    """A frozen part of a manifest. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """`.bin` or `.idx`: its size in bytes and its digest ('xxh3_128:HEX')."""

    bytes: int = Field(ge=0)
    digest: str


class BlockRecord(Record):
    """Digests ('xxh3_128:HEX') of the `.bin` in blocks of so many bytes, the last one maybe shorter.

    They say where in hundreds of gigabytes the damage is.
    """

    bytes: int = Field(ge=1)
    digests: list[str]


class Counts(Record):
    """Sums over documents. `tokens` holds the EODs; `text_bytes` is UTF-8, None where the text is not known;
    `malformed` is lines by kind."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    text_bytes: int | None = Field(ge=0)
    malformed: dict[str, int]

    @property
    def malformed_total(self) -> int:
        """Malformed lines of all kinds."""
        return sum(self.malformed.values())


class SourceRecord(Record):
    """One source as it was read: what it is, the state it was in, its digest as stored, and what came out of it."""

    identity: dict
    stamp: dict
    digest: str | None
    counts: Counts


class TokenizerRecord(Record):
    """The tokenizer of the corpus; the tokenizer itself is kept in PREFIX.tokenizer/."""

    kind: str
    fingerprint: str
    vocab_size: int = Field(ge=1)
    eod: int = Field(ge=0)
    pause_id: int = Field(ge=0)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerRecord:
        """The record of a loaded tokenizer."""
        return cls(**{name: getattr(tokenizer, name) for name in cls.model_fields})


class AdoptionRecord(Record):
    """What `adopt` found in a corpus that others made. Its sources are not known.

    Attributes:
        agreement: share of the ids of sampled documents that their text, encoded again, gives back.
        sampled: those documents.
        eod: EODs in the corpus.
        without_eod: documents that do not end with EOD.
        free_pause_ids: ids from the pause id on that stand nowhere in the corpus; None: all of them.
    """

    agreement: float = Field(ge=0, le=1)
    sampled: int = Field(ge=1)
    eod: int = Field(ge=0)
    without_eod: int = Field(ge=0)
    free_pause_ids: int | None = Field(ge=1)


class Plan(Record):
    """Everything that determines the bytes of a corpus. Two runs of one plan give the same corpus."""

    tokenizer: TokenizerRecord
    text_key: str
    damaged_shards: Literal["error", "keep"]
    sources: list[dict]

    def differences(self, other: Plan) -> list[str]:
        """What another plan has otherwise, one sentence each; empty for the same plan."""
        found = []
        ours, theirs = self.tokenizer, other.tokenizer
        found += [
            f"tokenizer {name}: {getattr(ours, name)} there, {getattr(theirs, name)} now"
            for name in TokenizerRecord.model_fields
            if getattr(ours, name) != getattr(theirs, name)
        ]
        for name in ("text_key", "damaged_shards"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name}: {getattr(self, name)} there, {getattr(other, name)} now")
        if len(self.sources) != len(other.sources):
            found.append(f"sources: {len(self.sources):,} there, {len(other.sources):,} now")
        for number, (one, two) in enumerate(zip(self.sources, other.sources, strict=False), start=1):
            if one != two:
                found.append(f"source {number:,}: {_shown(one)} there, {_shown(two)} now")
                break
        return found


class Manifest(Record):
    """The content of `PREFIX.manifest.json`, but for the digest over all of it that the file ends with.

    Attributes:
        version: 1 has neither blocks nor a digest of the manifest, 2 no adoption; they are still read.
        text_key, damaged_shards: options of `prepare`; None for a corpus of others.
        dtype: of the ids in `.bin`; `prepare` writes "uint16" or "int32".
        places: the first malformed lines of each kind.
        files: "bin" and "idx".
        blocks: of the `.bin`.
        sources: none for a corpus of others.
        adoption: None for a corpus that `prepare` made.
    """

    version: Literal[1, 2, 3] = MANIFEST_VERSION
    tokenizer: TokenizerRecord
    text_key: str | None
    damaged_shards: Literal["error", "keep"] | None
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]
    counts: Counts
    places: dict[str, list[Place]]
    files: dict[Literal["bin", "idx"], FileRecord]
    blocks: BlockRecord | None
    sources: list[SourceRecord]
    adoption: AdoptionRecord | None

    @property
    def made_by(self) -> Literal["prepare", "adopt"]:
        """The verb that wrote this manifest, and writes it anew with --overwrite."""
        return "prepare" if self.adoption is None else "adopt"

    @property
    def eod_count(self) -> int:
        """EODs in the corpus: one a document, where `prepare` made it."""
        return self.counts.documents if self.adoption is None else self.adoption.eod

    @property
    def plan(self) -> Plan:
        """What a corpus that `prepare` made was made of."""
        return Plan(
            tokenizer=self.tokenizer,
            text_key=self.text_key,
            damaged_shards=self.damaged_shards,
            sources=[source.identity for source in self.sources],
        )

    @property
    def fingerprint(self) -> str:
        """Content of the corpus: the digests of `.bin` and `.idx` and the tokenizer with its EOD and pause ids."""
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

    def save(self, prefix: str | Path) -> None:
        """Write `PREFIX.manifest.json`, whole or not at all."""
        content = {**self.model_dump(mode="json"), "digest": self._digest()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_whole(path_of(prefix, "manifest.json"), (text + "\n").encode())

    @classmethod
    def load(cls, prefix: str | Path) -> Manifest:
        """Read `PREFIX.manifest.json`.

        Raises:
            DataError: missing, unreadable, of another version, with fields that do not fit, or edited.
        """
        path = path_of(prefix, "manifest.json")
        if not path.is_file():
            raise DataError(_why_no_manifest(prefix))
        file = read_record(path, _ManifestFile)
        manifest = cls(**{name: getattr(file, name) for name in cls.model_fields})
        if (
            file.digest != manifest._digest()
            or (manifest.version > 1) == (manifest.blocks is None)
            or (manifest.version < 3 and manifest.adoption is not None)
        ):
            raise DataError(
                f"{path}: edited or damaged since it was written (expected digest {manifest._digest()}, got "
                f"{file.digest}); copy it again, or {manifest.made_by} the corpus again with --overwrite"
            )
        return manifest

    def _digest(self) -> str | None:
        if self.version == 1:
            return None
        later = {"adoption"} if self.version < 3 else set()
        content = json.dumps(self.model_dump(mode="json", exclude=later), sort_keys=True)
        return f"xxh3_128:{xxhash.xxh3_128_hexdigest(content.encode())}"


class _ManifestFile(Manifest):
    blocks: BlockRecord | None = None
    adoption: AdoptionRecord | None = None
    digest: str | None = None


def path_of(prefix: str | Path, extension: str) -> Path:
    """PREFIX.EXTENSION; the prefix may hold dots."""
    return Path(f"{prefix}.{extension}")


def replace_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Put a tokenizer into PREFIX.tokenizer/, where a corpus keeps its own. An older manifest goes first."""
    folder = path_of(prefix, "tokenizer")
    partial, old = (path_of(prefix, extension) for extension in TEMPORARY_FOLDERS)
    tokenizer.save(partial)
    path_of(prefix, "manifest.json").unlink(missing_ok=True)
    if folder.exists():  # out of the way in one step: half of it at its place would look like somebody else's folder
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_record(path: Path, kind: type[Record]):
    """Read a JSON file into a record of the given kind. Raises DataError naming the file and the field."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']} (got {str(first['input'])[:60]!r})") from None


def _why_no_manifest(prefix: str | Path) -> str:
    expected = path_of(prefix, "manifest.json")
    if path_of(prefix, "parts").is_dir():
        return (
            f"corpus {prefix} is not finished: {expected} is missing; run the same `prepare` command again, it goes on"
        )
    if path_of(prefix, "bin").exists():
        return (
            f"{expected} is missing: {prefix}.bin was not made by `pause-megatron prepare`, or its preparation did not "
            "finish; without a manifest its tokenizer and its completeness are unknown. If Megatron-LM's "
            f"preprocess_data.py made it: `pause-megatron adopt {prefix} --tokenizer T` checks it and writes one"
        )
    return f"no corpus at {prefix}: expected {expected}, written by `pause-megatron prepare --output {prefix}`"


def _shown(identity: dict) -> str:
    words = [f"{value:,} bytes" if key == "bytes" else str(value) for key, value in identity.items() if value]
    return f"({', '.join(words)})"
