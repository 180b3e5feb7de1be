"""What a checkpoint says about itself. The manifest is the completion marker: without it there is no checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pause_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "pause-megatron-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and digest ('xxh3_128:HEX') of one file."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter as its tensor-parallel shards hold it.

    Attributes:
        shape: of one shard
        partition_dim: dimension along which the shards are cut; None when every shard is the whole
    """

    shape: tuple[int, ...]
    partition_dim: int | None


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

    step: int
    optimizer_step: int
    tensor_parallel: int
    data_parallel: int
    zero_stage: int
    corpus: str
    parameters: dict[str, ParameterEntry]
    files: dict[str, FileEntry]
    progress: dict[str, int] = field(default_factory=dict)

    def dumps(self) -> str:
        """JSON text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads `folder/manifest.json`.

        Raises:
            CheckpointError: it is missing, not JSON, or of another format or version.
        """
        path = folder / MANIFEST
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls._parse(record)
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: expected a checkpoint with a {MANIFEST}, found none") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: expected a {FORMAT} manifest, version {VERSION}: {error!r}") from None

    @classmethod
    def _parse(cls, record: dict[str, Any]) -> Manifest:
        if record.pop("format") != FORMAT or record.pop("version") != VERSION:
            raise ValueError("another format or version")
        files = {_plain_name(name): FileEntry(**entry) for name, entry in record.pop("files").items()}
        parameters = {
            name: ParameterEntry(tuple(entry["shape"]), entry["partition_dim"])
            for name, entry in record.pop("parameters").items()
        }
        return cls(files=files, parameters=parameters, **record)


def _plain_name(name: str) -> str:
    """A manifest names files inside its folder, nothing else."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file name {name!r} leaves the checkpoint")
    return name
