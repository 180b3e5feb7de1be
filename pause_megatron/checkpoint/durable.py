"""Writes that survive a power cut: contents first, then the name."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 22


def sync_file(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# On Linux a folder is synced as a file is; that makes the names in it durable.
sync_folder = sync_file


def digest(path: Path) -> str:
    """XXH3-128 of a file, in hex: detects any accidental change, at the speed of the memory. Not a signature."""
    state = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, durably."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync_file(partial)
    os.replace(partial, path)
    sync_folder(path.parent)


def point(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target` (relative to its folder), replacing an older one in a single step."""
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, link)
    sync_folder(link.parent)
