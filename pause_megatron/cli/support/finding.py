"""The result of a probe of `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: What was checked.
        status: "ok"; "missing", so that training cannot run; "optional", absent and not needed; or "note".
        text: What is there.
        advice: What to do about it; "" for nothing.
    """

    name: str
    status: Literal["ok", "missing", "optional", "note"]
    text: str
    advice: str = ""


Probe = Callable[[], Iterable[Finding]]
"""One check of `doctor`."""
