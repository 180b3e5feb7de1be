"""The errors a user can cause. A message says what was expected, what came, and which file, field or line to change."""

from __future__ import annotations


class PauseMegatronError(Exception):
    """Base of every error that is the input's fault, not the program's. The CLI prints it without a traceback."""


class ConfigError(PauseMegatronError):
    """A configuration key, value or combination that cannot be run."""


class SharedError(ConfigError):
    """What every rank of a run has been told, in the same words: rank 0 says it for all."""


class DataError(PauseMegatronError):
    """A corpus, shard, tokenizer or index that is missing, damaged or does not fit the run."""


class CheckpointError(PauseMegatronError):
    """A checkpoint that is missing, incomplete, altered, or of another run."""


class TrainingError(PauseMegatronError):
    """A run that cannot go on: a loss that is not finite, a rank that disagrees, a signal that arrived."""


class OutputError(PauseMegatronError):
    """Standard output cannot be written, and what goes there is what was asked for.

    Attributes:
        reader_gone: whoever read it wants no more, as `head` does when it has its lines
    """

    def __init__(self, message: str, *, reader_gone: bool) -> None:
        super().__init__(message)
        self.reader_gone = reader_gone
