"""What a checkpoint says about itself. The manifest is the completion marker: without it there is no checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import read_regular
from pause_megatron.run_folder import MANIFEST, step_of

FORMAT = "pause-megatron-checkpoint"
VERSION = 3
"""Of what is written. 1 had no digest of the manifest, and is still read. There was no 2: one flipped bit would have
made a 3 of it, and a newer version is not passed over as damage is."""

_LARGEST_BYTES = 1 << 30
_DIGEST = re.compile(rb'"manifest_digest": "xxh3_128:([0-9a-f]{32})"')
_NO_DIGEST = "xxh3_128:" + "0" * 32
_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer release wrote: nothing is wrong with it, and an older one would lose its steps."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and digest ('xxh3_128:HEX') of one file."""

    __pydantic_config__ = _STRICT

    bytes: _Count
    digest: str


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter as its tensor-parallel shards hold it.

    Attributes:
        shape: of one shard
        partition_dim: dimension along which the shards are cut; None when every shard is the whole
    """

    __pydantic_config__ = _STRICT

    shape: tuple[_Size, ...]
    partition_dim: Literal[0, 1] | None


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    step: steps of the run that this checkpoint contains
    optimizer_step: optimizer steps that were applied (skipped ones do not count)
    tensor_parallel, data_parallel, zero_stage: topology that wrote it
    corpus: fingerprint of the prepared corpus
    parameters: every trainable parameter
    files: every other file of the checkpoint
    progress: counters of the run (raw tokens, text tokens, ...)
    """

    __pydantic_config__ = _STRICT

    step: _Count
    optimizer_step: _Count
    tensor_parallel: _Size
    data_parallel: _Size
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    corpus: str
    parameters: dict[str, ParameterEntry]
    files: dict[str, FileEntry]
    progress: dict[str, _Count] = field(default_factory=dict)

    def dumps(self) -> str:
        """JSON text. Its digest is that of the same bytes with zeros in place of the digest's own 32 digits."""
        record = {"format": FORMAT, "version": VERSION, "manifest_digest": _NO_DIGEST, **asdict(self)}
        text = json.dumps(record, indent=1)
        return text.replace(_NO_DIGEST, f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}", 1)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads `folder/manifest.json`.

        Raises:
            NewerFormatError: a newer release wrote it.
            CheckpointError: it is missing, damaged, or says something that cannot be; or it is another step's than the
                folder's name.
        """
        path = folder / MANIFEST
        try:
            raw = read_regular(path, _LARGEST_BYTES)
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: expected a checkpoint with a {MANIFEST}, found none") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        try:
            manifest = cls._parse(raw)
            manifest._check(step_of(folder.name))
        except _NewerVersionError as newer:
            raise NewerFormatError(
                f"{path}: expected {FORMAT} version {VERSION} or older, got version {newer}: a newer release of "
                "pause-megatron wrote it, which is needed to go on from it"
            ) from None
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r:.80}" for e in error.errors()[:3]
            )
            raise CheckpointError(f"{path}: expected a {FORMAT} manifest: {found}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected a {FORMAT} manifest: {error}") from None
        return manifest

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        record = json.loads(raw)
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError("another format")
        version, digest = record.pop("version", None), record.pop("manifest_digest", None)
        if type(version) is not int or version < 1:
            raise ValueError(f"version {version!r}")
        if digest is None and version == 1:
            return _MANIFEST.validate_json(json.dumps(record))
        whole = _digest_of(raw) == digest
        if version > VERSION and (whole or not _one_bit_apart(str(version), str(VERSION))):
            raise _NewerVersionError(str(version))
        if not whole:
            raise ValueError("its digest is not its own; it was altered after it was written")
        return _MANIFEST.validate_json(json.dumps(record))

    def _check(self, step_of_folder: int | None) -> None:
        """What ties its values to each other and to the folder's name."""
        if step_of_folder not in (None, self.step):
            raise ValueError(f"it is of step {self.step}, its folder is named after step {step_of_folder}")
        if self.progress.get("step", self.step) != self.step:
            raise ValueError(f"it is of step {self.step}, its progress is of step {self.progress['step']}")
        for name in self.files:
            _check_name(name)
        states = {name for name in self.files if name.endswith(".safetensors") and "/" not in name}
        ranks = self.tensor_parallel * self.data_parallel
        if len(states) != ranks or states != set(self.state_files()):  # counted first: the sizes may be anything
            sizes = f"{self.tensor_parallel} x {self.data_parallel}"
            raise ValueError(f"{len(states)} state files of {sizes} ranks, {', '.join(sorted(states)[:3])}")
        for name, entry in self.parameters.items():
            if entry.partition_dim is not None and entry.partition_dim >= len(entry.shape):
                raise ValueError(
                    f"parameter {name} of shape {entry.shape} is cut along dimension {entry.partition_dim}"
                )

    def state_files(self, tp_rank: int | None = None) -> list[str]:
        """Names of the state files, of one tensor-parallel rank or of all."""
        ranks = range(self.tensor_parallel) if tp_rank is None else (tp_rank,)
        return [
            state_file(tp, self.tensor_parallel, dp, self.data_parallel)
            for tp in ranks
            for dp in range(self.data_parallel)
        ]


class _NewerVersionError(Exception):
    pass


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def state_file(tp_rank: int, tp_size: int, dp_rank: int, dp_size: int) -> str:
    """Name of the file that one rank writes."""
    return f"state-tp{tp_rank:02d}-of-{tp_size:02d}-dp{dp_rank:04d}-of-{dp_size:04d}.safetensors"


def _digest_of(raw: bytes) -> str:
    found = list(_DIGEST.finditer(raw))
    if len(found) != 1:
        return ""
    start, stop = found[0].span(1)
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw[:start] + b'0' * 32 + raw[stop:])}"


def _one_bit_apart(one: str, other: str) -> bool:
    bits = [(ord(a) ^ ord(b)).bit_count() for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and sum(bits) == 1


def _check_name(name: str) -> None:
    """A manifest names files inside its folder, nothing else."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"file name {name!r} leaves the checkpoint")
    if path.as_posix() != name or name in (".", MANIFEST):
        raise ValueError(f"file name {name!r}")
