"""Lines that a program has written to standard error, without what its log handler puts before a message."""

from __future__ import annotations

import re

_PREFIX = re.compile(r"^(\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] |pause-megatron: )(\[rank \d+\] )?(warning: |error: )?")


def log_lines(text: str) -> list[str]:
    """Return the lines of a text; time stamp, rank and level are cut off those that the package has logged."""
    return [_PREFIX.sub("", line) for line in text.splitlines()]
