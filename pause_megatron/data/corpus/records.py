"""The JSON records of a corpus: files, blocks, counts, sources, tokenizer, and the spec that determines its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from pause_megatron.data.text.sources import DamagedShards
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError

BLOCK_BYTES = 64 << 20
"""Size of the blocks of a `.bin`."""

FileName = Literal["bin", "idx"]
"""Extensions of the files of a corpus that have digests."""


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


class SideRecord(FrozenModel):
    """A side array of a corpus, PREFIX.NAME.npy: one value for each token of the `.bin`.

    Attributes:
        file: Size and digest of the `.npy`.
        dtype: Data type of the values, a numpy name.
        bin: Digest of the `.bin` that the values belong to.
        idx: Digest of its `.idx`.
        kind: What the values are: losses or entropies of a model, or values of the user's own.
        model: Name of the folder of the model; None for the user's own values.
        model_digest: Digest of the content of the model's folder.
        context: Number of tokens that the model read at a time, at most.
        start: Id that the first token of a document was predicted from.
        compute: Data type of the forward pass, such as "fp32".
        batch_tokens: Largest number of tokens of a forward pass.
    """

    file: FileRecord
    dtype: Literal["float16", "float32", "float64", "uint8", "int8", "uint16", "int16", "int32", "int64"]
    bin: str
    idx: str
    kind: Literal["loss", "entropy", "user"]
    model: str | None = None
    model_digest: str | None = None
    context: int | None = None
    start: int | None = None
    compute: str | None = None
    batch_tokens: int | None = None


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


def read_record(path: Path, kind: type[ModelT]) -> ModelT:
    """Read a JSON file into a record.

    Args:
        path: Path of the file.
        kind: Class of the record.

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


def _identity_text(identity: dict[str, JsonValue]) -> str:
    words = [f"{value:,} bytes" if key == "bytes" else str(value) for key, value in identity.items() if value]
    return f"({', '.join(words)})"
