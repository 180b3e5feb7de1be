"""Which model a result is of: a digest of the files that decide what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import xxhash

from pause_megatron.errors import DataError
from pause_megatron.files.durable import READ_BYTES, write_whole

VERSION = 1

# What a folder's answers depend on, besides its weights.
_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

Report = Callable[[str, int, int], None]


def model_fingerprint(folder: Path, known: Path | None = None, report: Report | None = None) -> str:
    """Digest of a model folder's weights (their content), configuration and tokenizer, as 'xxh3_128:HEX'.

    Where the folder lies, when its files were written and what its model card says plays no part.

    Args:
        folder: a transformers folder.
        known: file that remembers digests, so that a large model is read once. A digest is taken from it if name, size
            and modification time are the same; it is written anew where anything was read.
        report: called with (what is done, bytes done, bytes in all).

    Raises:
        DataError: no folder, no weights, or a file that cannot be read.
    """
    files = sorted(path for path in (*folder.glob("*.safetensors"), *(folder / n for n in _NAMES)) if path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise DataError(f"{folder}: expected a transformers folder with *.safetensors, as export-hf writes it")
    try:
        facts = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        digests = _remembered(known, folder, facts)
        total = sum(facts[path.name][0] for path in files if path.name not in digests)
        done = 0
        for path in files:
            if path.name not in digests:
                digests[path.name] = _digest(path, lambda size, before=done: _say(report, before + size, total))
                done += facts[path.name][0]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if known is not None and done:
        entry = {"version": VERSION, "folder": str(folder.resolve()), "files": {}}
        entry["files"] = {name: [*facts[name], digests[name]] for name in sorted(facts)}
        write_whole(known, json.dumps(entry, indent=2).encode() + b"\n")
    whole = xxhash.xxh3_128()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\0".encode())
    return f"xxh3_128:{whole.hexdigest()}"


def _digest(path: Path, report: Callable[[int], None]) -> str:
    hasher, done = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(16 * READ_BYTES):
            hasher.update(block)
            done += len(block)
            report(done)
    return hasher.hexdigest()


def _say(report: Report | None, done: int, total: int) -> None:
    if report is not None:
        report("fingerprint of the model", done, total)


def _remembered(known: Path | None, folder: Path, facts: dict[str, list[int]]) -> dict[str, str]:
    """Digests that still hold, by file name. A memory that cannot be used is none: the files are read again."""
    try:
        entry = json.loads(known.read_bytes()) if known is not None else {}
        if entry["version"] != VERSION or entry["folder"] != str(folder.resolve()):
            return {}
        return {name: digest for name, (*fact, digest) in entry["files"].items() if facts.get(name) == fact}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
