"""Caches of window indices: keyed by the content of the corpus, written atomically, and checked before they are read.

megatron-core keys a cached index by the path of its corpus, and takes every file of that name for complete. Here the
key holds the content of the corpus. The files are built in a temporary folder and renamed into place, their digests
last. The rank that builds indices compares changed files with their digests, and rebuilds those that differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.digest import Hasher, bytes_digest, file_digest
from pause_megatron.files.durable import write_whole
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

Content = dict[str, str | None]
"""Content of a corpus: the digest of its documents' lengths and, from its manifest, of its files and tokenizer."""

_CHUNK = 1 << 22  # lengths that are digested at a time, 16 MiB
_SAMPLES, _SAMPLE = 64, 1 << 12  # of more lengths: the number of samples, and the lengths in each
_RECORD, _BUILDING, _DESCRIPTION = "-digests.json", ".building.tmp", "-description.txt"
_ABANDONED_SECONDS = 24 * 3600.0
_SHOWN = 8


class CachedFile(TypedDict):
    """An entry of KEY-digests.json: a file of the index, as it was written.

    Attributes:
        bytes: Size of the file.
        digest: xxh3_128 digest of its content.
        stamp: Inode, and time of the last change in nanoseconds, which the kernel keeps and no program can set.
    """

    bytes: int
    digest: str
    stamp: list[int]


class IndexCacheError(DataError):
    """An index that cannot be written, or that another rank should have built and did not."""


def content_of(dataset_path: str | None, lengths: np.ndarray) -> Content:
    """Return the content of a corpus, as far as windows depend on it: not names or times, so it is equal on every host.

    The indices follow from the lengths of the documents, so a digest of all lengths is exact. For C4, it reads 1.5 GB.
    Where a manifest fits the files, its fingerprint represents their content. A sample of the lengths then detects
    files that another program has rewritten beside an old manifest.

    Args:
        dataset_path: Prefix of the corpus.
        lengths: Tokens of each document, int32 [D].
    """
    manifest = _manifest_of(dataset_path)
    starts: Sequence[int] | np.ndarray = range(0, len(lengths), _CHUNK)
    size = _CHUNK
    if manifest is not None and len(lengths) > _CHUNK:
        starts, size = np.linspace(0, len(lengths) - _SAMPLE, _SAMPLES, dtype=np.int64), _SAMPLE
    hasher = Hasher(str(len(lengths)).encode())
    for start in starts:
        hasher.update(np.ascontiguousarray(lengths[start : start + size]).data)
    return {"lengths": hasher.digest, "manifest": manifest}


def _manifest_of(dataset_path: str | None) -> str | None:
    """Return the fingerprint of a corpus's manifest; None without one, or where it belongs to other files."""
    with contextlib.suppress(DataError, OSError):
        manifest = CorpusManifest.load(str(dataset_path))
        sizes = {name: path_of(str(dataset_path), name).stat().st_size for name in manifest.files}
        if all(manifest.files[name].bytes == size for name, size in sizes.items()):
            return manifest.fingerprint
    return None


class IndexCache:
    """The cached index of one dataset: all files in a folder whose names begin with its key.

    Args:
        folder: Folder of the index caches.
        key: megatron-core's hash of the dataset's description.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self._record = self.folder / f"{key}{_RECORD}"

    def is_whole(self, *, read: bool = False) -> bool:
        """Return whether every file is there as it was written. Log a file that is not.

        Args:
            read: Whether to read files that are unchanged (by their stamps) since their digests were taken.
        """
        files = self._recorded()
        if files is None:
            return False
        for name, file in files.items():
            path = self.folder / name
            try:
                changed = read or _stamp(path) != file["stamp"]
                fits = path.stat().st_size == file["bytes"] and (not changed or file_digest(path) == file["digest"])
            except OSError:
                fits = False
            if not fits:
                log.warning(f"{path}: digest mismatch; rebuilding the index", extra=EVERY_RANK)
                return False
        if any(_stamp(self.folder / name) != file["stamp"] for name, file in files.items()):
            with contextlib.suppress(OSError):  # a read-only folder: they are read again at the next start
                self._write_record({name: file["digest"] for name, file in files.items()})
        return True

    def require(self) -> None:
        """Check, in constant time, that another process has built the index.

        Raises:
            IndexCacheError: It has not, or its folder is not the one that this process sees.
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
        """Provide a temporary folder to build the index in. On exit, its files are renamed into place.

        Yields:
            Path of the temporary folder.

        Raises:
            IndexCacheError: The index cannot be written.
        """
        with contextlib.ExitStack() as closing:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(self.folder)
                temporary = Path(tempfile.mkdtemp(prefix=f"{self.key}.", suffix=_BUILDING, dir=self.folder))
                closing.callback(shutil.rmtree, temporary, ignore_errors=True)
                yield str(temporary)
                digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
                for name in digests:  # a process that has mapped an older file keeps its content
                    os.replace(temporary / name, self.folder / name)
                self._write_record(digests)
            except OSError as error:
                reason = error.strerror or f"{error}; is the disk full?"
                raise IndexCacheError(f"{self.folder}: cannot write index caches: {reason}") from error

    def _write_record(self, digests: Mapping[str, str]) -> None:
        files: dict[str, CachedFile] = {
            name: {"bytes": (self.folder / name).stat().st_size, "digest": digest, "stamp": _stamp(self.folder / name)}
            for name, digest in digests.items()
        }
        write_whole(self._record, json.dumps({"files": files, "digest": _digest(files)}, indent=1).encode())

    def _recorded(self) -> dict[str, CachedFile] | None:
        """Read the record; None without one, or where it is damaged."""
        try:
            record = json.loads(self._record.read_bytes())
            files = record["files"]
            whole = record["digest"] == _digest(files) and len(files) > 0
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return files if whole and all(name.startswith(f"{self.key}-") for name in files) else None


def _digest(files: Mapping[str, CachedFile]) -> str:
    return bytes_digest(json.dumps(files, sort_keys=True).encode())


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_ctime_ns]


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary folders of killed processes: old ones only, because others may be in use."""
    for path in folder.glob(f"*{_BUILDING}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def choose_folder(given: str | None, beside: str | Path, spare: str | Path | None = None) -> tuple[str, str | None]:
    """Choose the folder of a run's index caches. One process decides for all ranks.

    Args:
        given: `data.cache`.
        beside: Prefix of the first corpus. The default is `cache` in its folder.
        spare: The folder to take where the default cannot be written, as with shared corpora.

    Returns:
        The folder, and a message if it is the spare one.

    Raises:
        ConfigError: No folder can be written, and `given` holds no caches either.
    """
    folder = Path(given) if given else Path(os.path.abspath(beside)).parent / "cache"
    reason = _why_not_writable(folder)
    if reason is None or (given and any(folder.glob(f"*{_RECORD}"))):  # a read-only one with caches
        return str(folder), None
    if given or spare is None:
        raise ConfigError(f"data.cache={folder}: expected a folder to write index caches to, got: {reason}")
    if (spare_reason := _why_not_writable(Path(spare))) is not None:
        raise ConfigError(
            f"data.cache: expected a folder to write index caches to, got: {folder}: {reason}; {spare}: {spare_reason}"
        )
    return str(spare), f"{folder}: cannot be written ({reason}); index caches go to {spare}. data.cache names another"


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
    """Return the names of the records of all complete indices in a folder."""
    return {path.name for path in folder.glob(f"*{_RECORD}")}


def unused_files(folder: Path, current: Mapping[str, Content]) -> str | None:
    """Return a message that names index files of former contents of these corpora; None where there are none.

    Args:
        folder: Folder of the index caches.
        current: The current content of each corpus, by its prefix.
    """
    keys: list[str] = []
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
    return (
        part.get("class") == "PauseGPTDataset"
        and isinstance(path, str)
        and path in current
        and part.get("corpus_content") != current[path]
    )
