"""The checkpoint manifest: its schema, digest and checks. It is the completion marker: written last, read first."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pause_megatron.checkpoint.format import (
    DIGEST_KEY,
    FORMAT,
    FORMAT_KEY,
    MANIFEST,
    UNSIGNED_VERSION,
    VERSION,
    VERSION_KEY,
    is_state_file,
    state_file,
)
from pause_megatron.errors import CheckpointError
from pause_megatron.files.digest import PREFIX, bytes_digest, file_digest
from pause_megatron.files.durable import read_regular, sync_file
from pause_megatron.run_folder import step_of

_LARGEST_BYTES = 1 << 30
_DIGEST = re.compile(f'"{DIGEST_KEY}": "{PREFIX}([0-9a-f]{{32}})"'.encode())
_NO_DIGEST = PREFIX + "0" * 32
_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer release wrote. It is not damaged, so no older checkpoint is used in its place."""


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of one file.

    Attributes:
        bytes: Size of the file in bytes.
        digest: `xxh3_128:HEX`.
    """

    __pydantic_config__ = _STRICT

    bytes: _Count
    digest: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Sync a file to disk and return its size and digest."""
        sync_file(path)
        return cls(path.stat().st_size, file_digest(path))


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter as its tensor-parallel shards hold it.

    Attributes:
        shape: Shape of one shard.
        partition_dim: Dimension along which the parameter is sharded; None where every rank holds the whole.
    """

    __pydantic_config__ = _STRICT

    shape: tuple[_Size, ...]
    partition_dim: Literal[0, 1] | None


@dataclass(frozen=True)
class Manifest:
    """Step, topology, corpus, parameters and files of a checkpoint.

    Attributes:
        step: Training step after which the checkpoint was saved.
        optimizer_step: Optimizer steps that were applied; skipped steps do not count.
        tensor_parallel: Tensor-parallel size of the run that saved it.
        data_parallel: Data-parallel size of the run that saved it.
        zero_stage: ZeRO stage of the run that saved it.
        corpus: Fingerprint of the prepared corpus.
        parameters: Every trainable parameter, by native name.
        files: Every other file of the checkpoint, by path relative to its folder.
        progress: Counters of the run (raw tokens, text tokens, ...).
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
        """Return the JSON text. Its digest is taken over the same bytes with 32 zeros in the digest's own place."""
        record = {FORMAT_KEY: FORMAT, VERSION_KEY: VERSION, DIGEST_KEY: _NO_DIGEST, **asdict(self)}
        text = json.dumps(record, indent=1)
        return text.replace(_NO_DIGEST, bytes_digest(text.encode()), 1)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check `folder/manifest.json`.

        Args:
            folder: A checkpoint folder.

        Raises:
            NewerFormatError: A newer release wrote it.
            CheckpointError: It is missing, damaged or inconsistent, or its step is not that of the folder's name.
        """
        path = folder / MANIFEST
        try:
            raw = read_regular(path, _LARGEST_BYTES)
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: expected a checkpoint with a {MANIFEST}, got none") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        try:
            manifest = cls._parse(raw)
            manifest._check(step_of(folder.name))
        except _NewerVersionError as newer:
            raise NewerFormatError(
                f"{path}: expected {FORMAT} version {VERSION} or older, got version {newer}: a newer release of "
                "pause-megatron wrote it; install that release to resume from it"
            ) from None
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r:.80}" for e in error.errors()[:3]
            )
            raise CheckpointError(f"{path}: expected a {FORMAT} manifest: {faults}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected a {FORMAT} manifest: {error}") from None
        return manifest

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        record = json.loads(raw)
        if not isinstance(record, dict) or record.pop(FORMAT_KEY, None) != FORMAT:
            raise ValueError(f"its {FORMAT_KEY!r} is another")
        version, digest = record.pop(VERSION_KEY, None), record.pop(DIGEST_KEY, None)
        if type(version) is not int or version < 1:
            raise ValueError(f"{VERSION_KEY}: expected a whole number from 1 on, got {version!r}")
        if digest is None and version == UNSIGNED_VERSION:
            return _MANIFEST.validate_json(json.dumps(record))
        intact = _digest_of(raw) == digest
        if version > VERSION and (intact or not _one_bit_apart(str(version), str(VERSION))):
            raise _NewerVersionError(str(version))
        if not intact:
            raise ValueError("its digest does not match its content; it was altered after it was written")
        return _MANIFEST.validate_json(json.dumps(record))

    def _check(self, step_of_folder: int | None) -> None:
        """Check that values agree with each other and with the folder's name."""
        if step_of_folder not in (None, self.step):
            raise ValueError(f"step: expected {step_of_folder}, as the folder's name has it, got {self.step}")
        if self.progress.get("step", self.step) != self.step:
            raise ValueError(f"progress.step: expected {self.step}, got {self.progress['step']}")
        for name in self.files:
            _check_name(name)
        states = {name for name in self.files if is_state_file(name)}
        ranks = self.tensor_parallel * self.data_parallel
        if len(states) != ranks or states != set(self.state_files()):  # counted first: the sizes may be anything
            sizes = f"{self.tensor_parallel} x {self.data_parallel}"
            raise ValueError(
                f"files: expected a state file of each of {sizes} ranks, got {len(states)}: "
                f"{', '.join(sorted(states)[:3])}"
            )
        for name, entry in self.parameters.items():
            if entry.partition_dim is not None and entry.partition_dim >= len(entry.shape):
                raise ValueError(
                    f"parameters.{name}: expected a partition_dim below {len(entry.shape)}, got {entry.partition_dim}"
                )

    @property
    def shard_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one shard of each parameter, by native name."""
        return {name: entry.shape for name, entry in self.parameters.items()}

    def state_files(self, tp_rank: int | None = None) -> list[str]:
        """Return the names of the state files.

        Args:
            tp_rank: Tensor-parallel rank that wrote them; None: all ranks.
        """
        ranks = range(self.tensor_parallel) if tp_rank is None else (tp_rank,)
        return [
            state_file(tp, self.tensor_parallel, dp, self.data_parallel)
            for tp in ranks
            for dp in range(self.data_parallel)
        ]


class _NewerVersionError(Exception):
    pass


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def _digest_of(raw: bytes) -> str:
    digests = list(_DIGEST.finditer(raw))
    if len(digests) != 1:
        return ""
    start, stop = digests[0].span(1)
    return bytes_digest(raw[:start] + b"0" * 32 + raw[stop:])


def _one_bit_apart(one: str, other: str) -> bool:
    bits = [(ord(a) ^ ord(b)).bit_count() for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and sum(bits) == 1


def _check_name(name: str) -> None:
    """Check that a file name stays inside the checkpoint folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"files: expected file names inside the checkpoint, got {name!r}")
    if path.as_posix() != name or name in (".", MANIFEST):
        raise ValueError(f"files: expected plain relative file names, got {name!r}")
