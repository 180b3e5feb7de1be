"""Standard output and standard error that may fail: a reader that is gone, a full device, a terminal that was closed.

The rule of the program:

* Standard error is talk. A write to it that fails is counted and forgotten, whatever the verb.
* Standard output is a verb's result (`plan`, `inspect`, `generate`, `--print-config`, ...). A write that fails ends the
  verb: without a word and with exit code 141 where the reader is gone (`| head`), with one line and exit code 2 where
  it is anything else (a full device).
* While a run trains, its results are files, and standard output is talk too: see `tolerant_output`.
* Talk does not wait for long for a reader that stands still.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from pause_megatron.errors import OutputError
from pause_megatron.terminal.log import log_run_to_stderr

_PIECE = 1024  # characters, at most 4096 bytes: what a pipe that has room at all takes without waiting
_GROUP_BYTES = 4096
_PATIENCE_SECONDS = 5.0  # for a reader that stands still (a stopped pager, Ctrl-S)
_NAMES = {"stdout": "standard output", "stderr": "standard error"}


class StandardStream:
    """A text stream whose failures are counted; everything but writing is the stream's own.

    A character that the stream's encoding lacks is written as its escape (`\\u2013`).

    Args:
        stream: what is written to
        name: for messages
        required: a write that fails raises OutputError; else it is only counted
        missing: there was no such stream when the process began; every write fails

    Attributes:
        failed: writes and flushes that failed
        reason: why the first of them did
    """

    def __init__(self, stream: TextIO, name: str, *, required: bool, missing: bool = False) -> None:
        self._stream, self._name, self._missing = stream, name, missing
        self.required = required
        self.failed, self.reason = 0, ""
        self._lost: OutputError | None = None
        self._patience = _PATIENCE_SECONDS

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        """Write as the stream does; the length of the text, also where it is lost."""
        try:
            if self._missing:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            for start in range(0, len(text), _PIECE):
                self._require_room()
                self._stream.write(text[start : start + _PIECE])
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding)) and len(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._fail(error)
        return len(text)

    def _require_room(self) -> None:
        """Raise TimeoutError where a write would wait for a reader that stands still, and nobody needs the text."""
        if self.required:
            return
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # none, or a stream that is closed: writing will tell
            return
        if not has_room(descriptor, self._patience):
            self._patience = 0.0
            raise TimeoutError(errno.ETIMEDOUT, "its reader stands still")
        self._patience = _PATIENCE_SECONDS

    def writelines(self, lines: Any) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush as the stream does.

        Raises:
            OutputError: this or an earlier write has failed, and the stream is required.
        """
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)
        if self.required and self._lost is not None:  # somebody else caught it
            raise self._lost

    def describe(self) -> str | None:
        """How many writes were lost and why; None where all went well."""
        return f"{self._name}: {self.failed:,} writes failed ({self.reason})" if self.failed else None

    def _fail(self, error: OSError | ValueError) -> None:
        text = reason(error)
        self.failed += 1
        self.reason = self.reason or text
        if self.failed == 1:
            atexit.register(_drop_what_cannot_be_written, self._stream)
        if self.required:
            gone = isinstance(error, BrokenPipeError)
            self._lost = OutputError(f"{self._name}: expected a place to write to: {text}", reader_gone=gone)
            raise self._lost from error


@contextlib.contextmanager
def standard_streams() -> Iterator[StandardStream]:
    """While the body runs, sys.stdout and sys.stderr are `StandardStream`s: the first required, the second not.

    Descriptors 0, 1 and 2 that were closed when the process began lead to /dev/null from now on: a file that is opened
    later would else take their place, and get what libraries print.

    Yields:
        Standard output; the one of an enclosing call where there is one.
    """
    with contextlib.ExitStack() as closing:
        _fill_closed_descriptors()
        for name in _NAMES:
            # What it was at the start too: the watch on ranks that hang writes there.
            for place in (name, f"__{name}__"):
                closing.enter_context(_replaced(place, _NAMES[name], required=name == "stdout"))
        stdout = sys.stdout
        try:
            yield stdout
        finally:
            for name in _NAMES:
                with contextlib.suppress(OutputError):  # told already, by the flush of whoever needs it
                    getattr(sys, name).flush()


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """While the body runs and afterwards, nothing that fails on standard output or standard error ends the program."""
    with standard_streams() as stdout, log_run_to_stderr():
        # Not put back: what is left in its buffer would fail again at the end, and change the exit code.
        stdout.required = sys.__stdout__.required = False
        yield


def lost_output() -> list[str]:
    """A line for each of the standard streams on which writes were lost."""
    return [line for name in _NAMES if (line := getattr(getattr(sys, name), "describe", _nothing)())]


def write_from_handler(text: str) -> None:
    """Write a line to standard error in a handler of signals: one that came in the middle of a print may not print.

    Not where that would wait for a reader that stands still: the request to stop is what matters.
    """
    with contextlib.suppress(OSError, ValueError):
        if has_room(2, 0):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def write_lines(text: str) -> None:
    """Write lines to standard error so that those of other processes come between whole ones, if at all.

    Groups of at most 4096 bytes, which are written in one piece. Does not wait for long for a reader that stands still.
    """
    group = b""
    for line in [*io.BytesIO(text.encode(errors="backslashreplace")), b""]:
        if group and (not line or len(group) + len(line) > _GROUP_BYTES):
            with contextlib.suppress(OSError, ValueError):
                if has_room(2, _PATIENCE_SECONDS):
                    os.write(2, group)
            group = b""
        group += line[:_GROUP_BYTES]


def has_room(descriptor: int, seconds: float) -> bool:
    """Whether a write of at most 4096 bytes would not wait; looks for so long. True for files."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(1000 * seconds))


def reason(error: BaseException) -> str:
    """Why something failed, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _nothing() -> None:
    return None


@contextlib.contextmanager
def _replaced(place: str, name: str, *, required: bool) -> Iterator[None]:
    before = getattr(sys, place)
    if isinstance(before, StandardStream):
        yield
        return
    own = place.strip("_")
    now = getattr(sys, own)
    if isinstance(now, StandardStream) and (before is None or before is now._stream):
        stream = now
    elif before is None:
        file = open(1 if own == "stdout" else 2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        stream = StandardStream(file, name, required=required, missing=True)
    else:
        stream = StandardStream(before, name, required=required)
    setattr(sys, place, stream)
    try:
        yield
    finally:
        if getattr(sys, place) is stream:
            setattr(sys, place, before)


def _fill_closed_descriptors() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def _drop_what_cannot_be_written(stream: TextIO) -> None:
    """At the end of the process: what is left in a buffer must not fail once more, with a traceback and code 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
