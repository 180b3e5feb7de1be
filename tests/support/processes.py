"""Other processes as tests look at them; one may end at any moment, between being listed and being read too."""

from __future__ import annotations

import time
from collections.abc import Callable
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


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: It does not hold in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing in {seconds:g} s"
        time.sleep(0.01)
