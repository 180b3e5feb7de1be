"""Caches of window indices: keyed by what is in a corpus, complete or not there, and never read unchecked.

megatron-core names a cached index by the path of its corpus, and takes any file of the right name for whole. Here the
key holds the corpus's content; the files are built aside and moved into their folder, their digests last; and whoever
may build them first compares what was changed since with those digests. What does not fit is built again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pause_megatron.data.corpus.manifest import Manifest, path_of
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.durable import digest_of, write_whole
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

Content = dict[str, str | None]
"""What a corpus holds: the digests of its documents' lengths and, from its manifest, of its files and tokenizer."""

_PIECE = 1 << 22  # lengths digested together, 16 MiB
_SAMPLES, _SAMPLE = 64, 1 << 12  # of more than that: so many places, so many lengths at each
_RECORD, _BUILDING, _DESCRIPTION = "-digests.json", ".building.tmp", "-description.txt"
_ABANDONED_SECONDS = 24 * 3600.0
_SHOWN = 8


class IndexCacheError(DataError):
    """An index that cannot be written, or that another rank should have built and did not."""


def content_of(dataset_path: str | None, lengths: np.ndarray) -> Content:
    """What a corpus holds, as far as windows depend on it. Names and times do not: it is the same on every host.

    The indices follow from the documents' lengths, so a digest of those is exact; it costs 1.5 GB of reading at C4's
    size. Where a manifest fits the files, its digests tell as much, and a sample of the lengths tells whether the files
    have since been written by somebody who writes no manifest.

    Args:
        dataset_path: prefix of the corpus.
        lengths: of its documents in tokens, int32 [D].
    """
    manifest = _manifest_of(dataset_path)
    starts = range(0, len(lengths), _PIECE)
    size = _PIECE
    if manifest is not None and len(lengths) > _PIECE:
        starts, size = np.linspace(0, len(lengths) - _SAMPLE, _SAMPLES, dtype=np.int64), _SAMPLE
    hasher = xxhash.xxh3_128(str(len(lengths)).encode())
    for start in starts:
        hasher.update(np.ascontiguousarray(lengths[start : start + size]).data)
    return {"lengths": f"xxh3_128:{hasher.hexdigest()}", "manifest": manifest}


def _manifest_of(dataset_path: str | None) -> str | None:
    """Fingerprint of the manifest beside a corpus; None without one, or where it is of other files."""
    with contextlib.suppress(DataError, OSError):
        manifest = Manifest.load(str(dataset_path))
        sizes = {name: path_of(str(dataset_path), name).stat().st_size for name in manifest.files}
        if all(manifest.files[name].bytes == size for name, size in sizes.items()):
            return manifest.fingerprint
    return None


class IndexCache:
    """The cached files of one dataset: all names in `folder` that begin with its key."""

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self._record = self.folder / f"{key}{_RECORD}"

    def is_whole(self, *, read: bool = False) -> bool:
        """Whether every file is there as it was written; files that are not are told of.

        Args:
            read: compare every byte, also of files that nobody has changed since their digests were taken. That the
                kernel knows: the time of a file's last change cannot be set.
        """
        files = self._recorded()
        if files is None:
            return False
        for name, file in files.items():
            path = self.folder / name
            try:
                changed = read or _stamp(path) != file["stamp"]
                fits = path.stat().st_size == file["bytes"] and (not changed or digest_of(path) == file["digest"])
            except OSError:
                fits = False
            if not fits:
                log.warning(f"{path}: not the index that was written there; it is built again", extra=EVERY_RANK)
                return False
        if any(_stamp(self.folder / name) != file["stamp"] for name, file in files.items()):
            with contextlib.suppress(OSError):  # read again at the next start where nothing may be written
                self._write_record({name: file["digest"] for name, file in files.items()})
        return True

    def require(self) -> None:
        """Make sure, in constant time, that another process has built the files.

        Raises:
            IndexCacheError: it has not, or not in a folder that this process sees.
        """
        files = self._recorded()
        sizes = {path.name: path.stat().st_size for path in self.folder.glob(f"{self.key}-*")}
        if files is None or any(sizes.get(name) != file["bytes"] for name, file in files.items()):
            raise IndexCacheError(
                f"{self.folder}: expected the index {self.key} of this corpus as it is now, got "
                f"{'none' if files is None else 'files that do not fit its record'}. Rank 0 builds it, without "
                "fast_cache_load and defer_npy_index_mmap, in a folder that all hosts must see"
            )

    @contextlib.contextmanager
    def building(self) -> Iterator[str]:
        """A folder to build the files in. They appear together, once the body has written all of them.

        Raises:
            IndexCacheError: they cannot be written.
        """
        with contextlib.ExitStack() as closing:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(self.folder)
                aside = Path(tempfile.mkdtemp(prefix=f"{self.key}.", suffix=_BUILDING, dir=self.folder))
                closing.callback(shutil.rmtree, aside, ignore_errors=True)
                yield str(aside)
                digests = {path.name: digest_of(path) for path in sorted(aside.iterdir())}
                for name in digests:  # a process that has mapped an older file keeps it
                    os.replace(aside / name, self.folder / name)
                self._write_record(digests)
            except OSError as error:
                reason = error.strerror or f"{error}; is the disk full?"
                raise IndexCacheError(f"{self.folder}: expected to write index caches there, got: {reason}") from error

    def _write_record(self, digests: Mapping[str, str]) -> None:
        files = {
            name: {"bytes": (self.folder / name).stat().st_size, "digest": digest, "stamp": _stamp(self.folder / name)}
            for name, digest in digests.items()
        }
        write_whole(self._record, json.dumps({"files": files, "digest": _digest(files)}, indent=1).encode())

    def _recorded(self) -> dict[str, dict[str, Any]] | None:
        """The record; None without one, or where a bit of it is not as it was written."""
        try:
            record = json.loads(self._record.read_bytes())
            files = record["files"]
            whole = record["digest"] == _digest(files) and len(files) > 0
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return files if whole and all(name.startswith(f"{self.key}-") for name in files) else None


def _digest(files: Mapping[str, Any]) -> str:
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())}"


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_ctime_ns]


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left. Others may be building, so it must be old."""
    for path in folder.glob(f"*{_BUILDING}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def choose_folder(given: str | None, beside: str | Path, spare: str | Path | None = None) -> tuple[str, str | None]:
    """Where the caches of a run stand. One process decides for all.

    Args:
        given: data.cache.
        beside: prefix of the first corpus; its folder's `cache` is the default.
        spare: taken where that cannot be written, as with shared corpora.

    Returns:
        the folder, and a sentence where it is the spare one.

    Raises:
        ConfigError: no folder can be written, and `given` holds no caches either.
    """
    folder = Path(given) if given else Path(os.path.abspath(beside)).parent / "cache"
    refusal = _why_not_writable(folder)
    if refusal is None or (given and any(folder.glob(f"*{_RECORD}"))):  # a shared one that somebody has filled
        return str(folder), None
    if given or spare is None:
        raise ConfigError(f"data.cache={folder}: expected a folder to write index caches to, got: {refusal}")
    if (why := _why_not_writable(Path(spare))) is not None:
        raise ConfigError(
            f"data.cache: expected a folder to write index caches to, got: {folder}: {refusal}; {spare}: {why}"
        )
    return str(spare), f"{folder}: cannot be written ({refusal}); index caches go to {spare}. data.cache names another"


def _why_not_writable(folder: Path) -> str | None:
    if folder.exists() and not folder.is_dir():
        return "a file"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        return error.strerror or str(error)
    return None


def cached_indices(folder: Path) -> set[str]:
    """Names of the records of all complete indices in a folder."""
    return {path.name for path in folder.glob(f"*{_RECORD}")}


def unused_files(folder: Path, current: Mapping[str, Content]) -> str | None:
    """A sentence about index files of these corpora that no run reads any more; None where there are none.

    Args:
        folder: of the caches.
        current: what each corpus, by its prefix, holds now.
    """
    keys = []
    for path in sorted(folder.glob(f"*PauseGPTDataset-*{_DESCRIPTION}")) + sorted(
        folder.glob("*-BlendedDataset-*.txt")
    ):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            if any(_is_outdated(part, current) for part in _described(json.loads(path.read_bytes()))):
                keys.append(path.name.partition("-")[0])
    if not keys:
        return None
    size = sum(path.stat().st_size for key in keys for path in folder.glob(f"{key}-*"))
    more = f" and {len(keys) - _SHOWN:,} more" if len(keys) > _SHOWN else ""
    return (
        f"{folder}: index files of what these corpora held before, or of an earlier version, are not used any more and "
        f"may be deleted ({size:,} bytes): {', '.join(f'{key}-*' for key in keys[:_SHOWN])}{more}"
    )


def _described(description: Any) -> list[Mapping[str, Any]]:
    return description.get("datasets") or [description]


def _is_outdated(part: Mapping[str, Any], current: Mapping[str, Content]) -> bool:
    path = part.get("dataset_path")
    return part.get("class") == "PauseGPTDataset" and path in current and part.get("corpus_content") != current[path]
