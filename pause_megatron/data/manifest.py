"""What a prepared corpus is and was made of, and opening one with every check that takes constant time.

`PREFIX.manifest.json` appears last and is the mark of a complete corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pause_megatron.data.documents import Place
from pause_megatron.data.indexed import read_header
from pause_megatron.data.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.durable import digest_of, write_whole
from pause_megatron.errors import DataError

MANIFEST_VERSION = 1


class Record(BaseModel):
    """A frozen part of a manifest. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """One file that `prepare` wrote: its size in bytes and its digest ('xxh3_128:HEX')."""

    bytes: int = Field(ge=0)
    digest: str


class Counts(Record):
    """Sums over documents. `tokens` holds one EOD a document; `text_bytes` is UTF-8; `malformed` is lines by kind."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
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
    """The content of `PREFIX.manifest.json`.

    Attributes:
        dtype: of the ids in `.bin`, "uint16" or "int32".
        places: the first malformed lines of each kind.
        files: "bin" and "idx".
    """

    version: Literal[1] = MANIFEST_VERSION
    tokenizer: TokenizerRecord
    text_key: str
    damaged_shards: Literal["error", "keep"]
    dtype: Literal["uint16", "int32"]
    counts: Counts
    places: dict[str, list[Place]]
    files: dict[Literal["bin", "idx"], FileRecord]
    sources: list[SourceRecord]

    @property
    def plan(self) -> Plan:
        """What the corpus was made of."""
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
        write_whole(path_of(prefix, "manifest.json"), (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def load(cls, prefix: str | Path) -> Manifest:
        """Read `PREFIX.manifest.json`.

        Raises:
            DataError: missing, unreadable, of another version, or with fields that do not fit.
        """
        path = path_of(prefix, "manifest.json")
        if not path.is_file():
            raise DataError(_why_no_manifest(prefix))
        return read_record(path, cls)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus that passed the constant-time checks."""

    prefix: str
    manifest: Manifest
    tokenizer: Tokenizer

    def verify(self) -> None:
        """Read `.bin` and `.idx` whole and compare their digests with the manifest's (GB/s, so minutes for C4).

        Raises:
            DataError: a byte differs from what `prepare` wrote.
        """
        for name, record in self.manifest.files.items():
            path = path_of(self.prefix, name)
            found = digest_of(path)
            if found != record.digest:
                raise DataError(
                    f"{path}: altered since it was prepared (expected {record.digest}, came {found}); prepare it again "
                    "with --overwrite"
                )


def path_of(prefix: str | Path, extension: str) -> Path:
    """PREFIX.EXTENSION; the prefix may hold dots."""
    return Path(f"{prefix}.{extension}")


def read_record(path: Path, kind: type[Record]):
    """Read a JSON file into a record of the given kind. Raises DataError naming the file and the field."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']} (came {str(first['input'])[:60]!r})") from None


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
            raise DataError(f"{path} is missing, though {path_of(prefix, 'manifest.json')} says that it was prepared")
        sizes[name] = path.stat().st_size
    header = read_header(path_of(prefix, "idx"))
    bin_path, idx_path = path_of(prefix, "bin"), path_of(prefix, "idx")
    if sizes["bin"] != header.bin_bytes:
        relation = "shorter" if sizes["bin"] < header.bin_bytes else "longer"
        raise DataError(
            f"{bin_path} is {relation} than its index says: {idx_path.name} needs {header.bin_bytes:,} bytes, the file "
            f"has {sizes['bin']:,}; it was cut or overwritten. Copy it again, or prepare it with --overwrite"
        )
    for name, size in sizes.items():
        if size != manifest.files[name].bytes:
            raise DataError(
                f"{path_of(prefix, name)}: {size:,} bytes, but its manifest says {manifest.files[name].bytes:,}: the "
                "files are of different corpora"
            )
    if (header.dtype, header.documents) != (manifest.dtype, manifest.counts.documents):
        raise DataError(
            f"{idx_path}: {header.documents:,} documents of {header.dtype}, but its manifest says "
            f"{manifest.counts.documents:,} of {manifest.dtype}: the files are of different corpora"
        )


def _why_no_manifest(prefix: str | Path) -> str:
    expected = path_of(prefix, "manifest.json")
    if path_of(prefix, "parts").is_dir():
        return (
            f"corpus {prefix} is not finished: {expected} is missing; run the same `prepare` command again, it goes on"
        )
    if path_of(prefix, "bin").exists():
        return (
            f"{expected} is missing: {prefix}.bin was not made by `pause-megatron prepare`, or its preparation did not "
            "finish; without a manifest its tokenizer and its completeness are unknown"
        )
    return f"no corpus at {prefix}: expected {expected}, written by `pause-megatron prepare --output {prefix}`"


def _shown(identity: dict) -> str:
    return ", ".join(str(value) for value in identity.values() if value)
