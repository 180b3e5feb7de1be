"""The nearest known name, for messages about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ". Did you mean 'x'?" for the known name nearest to an unknown one, or "" where none is close.

    Args:
        name: The unknown name.
        known: Names that exist.
        cutoff: Smallest similarity that counts as close, 0 to 1.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f". Did you mean {close[0]!r}?" if close else ""
