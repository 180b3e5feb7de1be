"""Lines that a program has written to standard error, without what its log handler puts before a message."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

from pause_megatron.terminal.log import log_to_stderr

_PREFIX = re.compile(r"^(\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] |pause-megatron: )(\[rank \d+\] )?(warning: |error: )?")


def log_lines(text: str) -> list[str]:
    """Return the lines of a text; time stamp, rank and level are cut off those that the package has logged."""
    return [_PREFIX.sub("", line) for line in text.splitlines()]


@contextlib.contextmanager
def captured_log() -> Iterator[io.StringIO]:
    """Yield a file that gets the log and all other standard error of this rank."""
    with contextlib.redirect_stderr(io.StringIO()) as text, log_to_stderr(timestamps=False):
        yield text
