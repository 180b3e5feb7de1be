"""Log records on standard error: the standard library's `logging`, filtered by rank.

Modules log to `logging.getLogger(__name__)`. Rank 0 writes records of every level. Other ranks write errors and records
with `extra=EVERY_RANK`, after "[rank N]". The command line installs the handler. A program that imports the package
gets the records through its own logging configuration.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Final

ROOT: Final = "pause_megatron"
EVERY_RANK: Final = {"every_rank": True}
"""For `extra=` of a record that concerns the rank it comes from: it is written on every rank."""

_LEVELS = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}


class RankFilter(logging.Filter):
    """Filter that passes every record on rank 0; on other ranks errors and records with `extra=EVERY_RANK`.

    Attributes:
        rank: Global rank of this process; 0 until `set_rank` is called.
    """

    rank = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this rank writes the record."""
        return not self.rank or record.levelno >= logging.ERROR or bool(getattr(record, "every_rank", False))


_RANK_FILTER = RankFilter()


def set_rank(rank: int) -> None:
    """Set the global rank of this process for all handlers of `log_to_stderr`."""
    _RANK_FILTER.rank = rank


class _Formatter(logging.Formatter):
    def __init__(self, *, timestamps: bool) -> None:
        super().__init__("%(message)s", "%Y-%m-%d %H:%M:%S")
        self._timestamps = timestamps

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        begin = f"[{self.formatTime(record, self.datefmt)}] " if self._timestamps else "pause-megatron: "
        rank = f"[rank {_RANK_FILTER.rank}] " if _RANK_FILTER.rank else ""
        return f"{begin}{rank}{_LEVELS.get(record.levelno, '')}{text}"


class _StderrHandler(logging.Handler):
    """Handler that writes to what `sys.stderr` is at that moment; on a terminal above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            tqdm = sys.modules.get("tqdm")
            if tqdm is not None and sys.stderr.isatty():
                tqdm.tqdm.write(text, file=sys.stderr)
            else:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def log_to_stderr(*, timestamps: bool) -> Iterator[None]:
    """Write the package's records of level INFO and above to standard error while the body runs.

    Args:
        timestamps: Begin lines with date and time, as a run does; otherwise with "pause-megatron:".
    """
    logger = logging.getLogger(ROOT)
    before = logger.handlers, logger.level, logger.propagate
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(timestamps=timestamps))
    handler.addFilter(_RANK_FILTER)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def log_run_to_stderr() -> contextlib.AbstractContextManager[None]:
    """Log to stderr with time stamps, as `log_to_stderr` does, unless a program handles the package's INFO records."""
    logger = logging.getLogger(ROOT)
    ours = any(isinstance(handler, _StderrHandler) for handler in logger.handlers)
    handled = logger.hasHandlers() and logger.isEnabledFor(logging.INFO)
    return contextlib.nullcontext() if handled and not ours else log_to_stderr(timestamps=True)
