"""The manifest of a tokenized corpus: tokenizer, sources, counts and digests.

`PREFIX.manifest.json` is written last and marks a complete corpus. It contains a digest of itself, so that an edited
or damaged manifest is detected.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from pause_megatron.data.text.documents import LineLocation
from pause_megatron.data.text.sources import DamagedShards
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import write_whole

MANIFEST_VERSION: Literal[3] = 3
BLOCK_BYTES = 64 << 20
TEMPORARY_FOLDERS = ("tokenizer.tmp", "tokenizer.old.tmp")
"""Extensions of the folders that a killed `replace_tokenizer` leaves."""


FileName = Literal["bin", "idx"]


class FrozenModel(BaseModel):
    """Base class of the JSON records of a corpus: immutable, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ModelT = TypeVar("ModelT", bound=FrozenModel)


class FileRecord(FrozenModel):
    """The size and the digest of a `.bin` or `.idx`.

    Attributes:
        bytes: Size of the file.
        digest: Digest 'xxh3_128:HEX' of its content.
    """

    bytes: int = Field(ge=0)
    digest: str


class BlockRecord(FrozenModel):
    """Digests of the blocks of a `.bin`, which locate damage in a large file.

    Attributes:
        bytes: Size of a block; the last one may be shorter.
        digests: Digest 'xxh3_128:HEX' of each block.
    """

    bytes: int = Field(ge=1)
    digests: list[str]


class Counts(FrozenModel):
    """Sums over documents.

    Attributes:
        documents: Number of documents.
        tokens: Number of token ids, EODs included.
        text_bytes: Size of the text as UTF-8; None where the text is not known (`adopt`).
        malformed: Number of malformed lines by kind.
    """

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    text_bytes: int | None = Field(ge=0)
    malformed: dict[str, int]

    @property
    def malformed_total(self) -> int:
        """Number of malformed lines of all kinds."""
        return sum(self.malformed.values())


class SourceCounts(Counts):
    """Sums over documents whose text `prepare` has read."""

    text_bytes: int = Field(ge=0)


class SourceRecord(FrozenModel):
    """One source as it was read.

    Attributes:
        identity: JSON values that distinguish the source from others, see `Source.identity`.
        stamp: JSON values that change when its content may have changed, see `Source.stamp`.
        digest: Digest 'xxh3_128:HEX' of the source as stored; None where it is not known.
        counts: Sums over its documents.
    """

    identity: dict[str, JsonValue]
    stamp: dict[str, JsonValue]
    digest: str | None
    counts: SourceCounts


class TokenizerRecord(FrozenModel):
    """The identity of a corpus's tokenizer; the tokenizer itself is saved in PREFIX.tokenizer/.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        fingerprint: "KIND:SHA256" of the tokenizer's content.
        vocab_size: Number of ids of text (largest id + 1).
        eod: Id of the end of a document.
        pause_id: First id of `<pause>`.
    """

    kind: str
    fingerprint: str
    vocab_size: int = Field(ge=1)
    eod: int = Field(ge=0)
    pause_id: int = Field(ge=0)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerRecord:
        """Return the record of a loaded tokenizer."""
        return cls(
            kind=tokenizer.kind,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            pause_id=tokenizer.pause_id,
        )


class AdoptionRecord(FrozenModel):
    """What `adopt` found in a corpus of Megatron-LM's preprocess_data.py, whose sources are not known.

    Attributes:
        agreement: Fraction of the ids of sampled documents that decoding and encoding reproduces.
        sampled: Number of sampled documents.
        eod: Number of EODs in the corpus.
        without_eod: Number of documents that do not end with EOD.
        free_pause_ids: Number of ids, from the pause id on, that do not occur in the corpus; None if none occurs.
    """

    agreement: float = Field(ge=0, le=1)
    sampled: int = Field(ge=1)
    eod: int = Field(ge=0)
    without_eod: int = Field(ge=0)
    free_pause_ids: int | None = Field(ge=1)


class CorpusSpec(FrozenModel):
    """Everything that determines the bytes of a corpus that `prepare` writes.

    Attributes:
        tokenizer: The tokenizer with its EOD and pause ids.
        text_key: Key of the text in a JSON object.
        damaged_shards: What to do with a damaged shard.
        sources: Identity of each source, in order.
    """

    tokenizer: TokenizerRecord
    text_key: str
    damaged_shards: DamagedShards
    sources: list[dict[str, JsonValue]]

    def differences(self, other: CorpusSpec) -> list[str]:
        """Return the differences from another spec, one sentence each; empty for equal specs."""
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
                found.append(f"source {number:,}: {_identity_text(one)} there, {_identity_text(two)} now")
                break
        return found


class Manifest(FrozenModel):
    """The content of `PREFIX.manifest.json`, without the digest over it that the file ends with.

    Attributes:
        version: Format version. 1 has neither blocks nor a digest of the manifest, 2 no adoption; both can be read.
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
    """

    version: Literal[1, 2, 3] = MANIFEST_VERSION
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

    def save(self, prefix: str | Path) -> None:
        """Write `PREFIX.manifest.json` atomically."""
        content = {**self.model_dump(mode="json"), "digest": self._digest()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_whole(path_of(prefix, "manifest.json"), (text + "\n").encode())

    @classmethod
    def load(cls, prefix: str | Path) -> Manifest:
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
            or (manifest.version > 1) == (manifest.blocks is None)
            or (manifest.version < 3 and manifest.adoption is not None)
        ):
            raise DataError(
                f"{path}: expected digest {manifest._digest()}, got {file.digest}: edited or damaged after it was "
                f"written. Copy it again, or {manifest.made_by} the corpus again with --overwrite"
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
    """Return the path PREFIX.EXTENSION; the prefix may contain dots."""
    return Path(f"{prefix}.{extension}")


def replace_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Replace PREFIX.tokenizer/ by a tokenizer, after removing an older manifest."""
    folder = path_of(prefix, "tokenizer")
    partial, old = (path_of(prefix, extension) for extension in TEMPORARY_FOLDERS)
    tokenizer.save(partial)
    path_of(prefix, "manifest.json").unlink(missing_ok=True)
    if folder.exists():  # renamed atomically: a half-removed folder would look like one of another program
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_record(path: Path, kind: type[ModelT]) -> ModelT:
    """Read a JSON file into a record of the given class.

    Raises:
        DataError: The file is unreadable or invalid; the message names the file and the field.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']} (got {str(first['input'])[:60]!r})") from None


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


def _identity_text(identity: dict[str, JsonValue]) -> str:
    words = [f"{value:,} bytes" if key == "bytes" else str(value) for key, value in identity.items() if value]
    return f"({', '.join(words)})"
