"""What a probe of `doctor` yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass
class Finding:
    """One line of the report."""

    name: str
    status: str  # "ok", "missing" (training cannot run), "optional" (absent, not needed), "note"
    text: str
    advice: str = ""


Probe = Callable[[], Iterable[Finding]]
