"""Other processes as tests look at them; one may end at any moment, between being listed and being read too."""

from __future__ import annotations

from pathlib import Path

from pause_megatron.host.processes import parent, stat, words


def children(pid: int, word: str = "") -> list[int]:
    """Return the process numbers of the children that run, of those whose command line holds `word`."""
    listed = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [
        child for child in listed if parent(child) == pid and not has_ended(child) and word in " ".join(words(child))
    ]


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or is when its parent looks for it."""
    return (stat(pid) or ["X"])[0] in "ZX"
