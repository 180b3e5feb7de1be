"""The fingerprint of a model folder: a digest of the files that its answers depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pause_megatron.errors import DataError
from pause_megatron.files.digest import PREFIX, Hasher, file_digest
from pause_megatron.files.durable import write_whole
from pause_megatron.files.typed_json import TypedJson, read_object
from pause_megatron.terminal.progress import Report

# The files, besides the weights, that answers depend on.
_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class ModelDigests(TypedJson):
    """The content of model.json: the digest of each file, valid while its size and modification time are the same.

    Attributes:
        version: Version of the format.
        folder: Absolute path of the model folder.
        files: (bytes, modification time in ns, digest) by file name.
    """

    version: Literal[1] = 1
    folder: str
    files: dict[str, tuple[int, int, str]]


def model_fingerprint(folder: Path, known: Path | None = None, report: Report | None = None) -> str:
    """Return the digest of a model's weights, configuration and tokenizer, as 'xxh3_128:HEX'.

    It is a digest of contents. The folder's path, its modification times and the model card do not enter.

    Args:
        folder: A transformers folder.
        known: Cache of digests (model.json), so that a large model is read once. A digest is taken from it if name,
            size and modification time are the same. It is rewritten if any file was read.
        report: Progress callback, called with (what is done, bytes done, bytes in all).

    Raises:
        DataError: The folder or its weights are missing, or a file cannot be read.
    """
    files = sorted(path for path in (*folder.glob("*.safetensors"), *(folder / n for n in _NAMES)) if path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise DataError(
            f"{folder}: expected a transformers folder with *.safetensors, as export-hf writes it, got none"
        )
    try:
        stats = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
        digests = _cached(known, folder, stats)
        unread = [path for path in files if path.name not in digests]
        total = sum(stats[path.name][0] for path in unread)
        done = 0
        for path in unread:
            digests[path.name] = _digest(path, report, done, total)
            done += stats[path.name][0]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if known is not None and done:
        entries = {name: (*stats[name], digests[name]) for name in sorted(stats)}
        cache = ModelDigests(folder=str(folder.resolve()), files=entries)
        write_whole(known, json.dumps(cache.model_dump(mode="json"), indent=2).encode() + b"\n")
    whole = Hasher()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\0".encode())
    return whole.digest


def _digest(path: Path, report: Report | None, done: int, total: int) -> str:
    """Return the digest of a file, without the prefix.

    Args:
        path: The file.
        report: Progress callback.
        done: Bytes of the files before it.
        total: Bytes of all files.
    """

    def on_read(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report("fingerprint of the model", done, total)

    return file_digest(path, on_read=on_read).removeprefix(PREFIX)


def _cached(known: Path | None, folder: Path, stats: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Return the digests that are still valid, by file name. A cache that cannot be used counts as empty."""
    if known is None:
        return {}
    try:
        cache = ModelDigests.parse(read_object(known), str(known))
    except DataError:
        return {}
    if cache.folder != str(folder.resolve()):
        return {}
    return {name: digest for name, (size, time, digest) in cache.files.items() if stats.get(name) == (size, time)}
