"""Errors that a user can cause. A message has the form "PLACE: expected X, got Y", with the file, field or line."""

from __future__ import annotations


class PauseMegatronError(Exception):
    """Base class of all errors that the input causes. The command line prints them without a traceback."""


class ConfigError(PauseMegatronError):
    """An invalid configuration key, value or combination."""


class SharedError(ConfigError):
    """An error that every rank raises with the same message; rank 0 prints it."""


class DataError(PauseMegatronError):
    """A missing or damaged corpus, shard, tokenizer or index, or one that does not fit the run."""


class CheckpointError(PauseMegatronError):
    """A missing, incomplete or altered checkpoint, or one of another run."""


class TrainingError(PauseMegatronError):
    """A run that cannot continue: a loss that is not finite, ranks that differ, a signal."""


class OutputError(PauseMegatronError):
    """A failed write of a verb's result to standard output.

    Args:
        message: The message.
        reader_gone: Whether the reader has closed the pipe, as `head` does.

    Attributes:
        reader_gone: Whether the reader has closed the pipe, as `head` does.
    """

    def __init__(self, message: str, *, reader_gone: bool) -> None:
        super().__init__(message)
        self.reader_gone = reader_gone
