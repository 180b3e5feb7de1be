"""Standard output and standard error that may fail: a closed pipe, a full device, a closed terminal.

The rules:

* Standard error has messages. A failed write to it is counted and ignored.
* Standard output has a verb's result (`plan`, `inspect`, `generate`, `--print-config`, ...). A failed write ends the
  verb: silently and with exit code 141 where the reader has closed the pipe (`| head`), with one line and exit code 2
  otherwise (a full device).
* While a run trains, its results are files, and standard output has messages, too: see `tolerant_output`.
* Messages do not block for long on a stalled reader.
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
from typing import Any, TextIO, cast

from pause_megatron.errors import OutputError
from pause_megatron.terminal.log import log_run_to_stderr

_PIECE = 1024  # characters, at most 4096 bytes, which a pipe with room takes without blocking
_GROUP_BYTES = 4096
_STALL_SECONDS = 5.0  # timeout for a stalled reader (a stopped pager, Ctrl-S)
_NAMES = {"stdout": "standard output", "stderr": "standard error"}


class StandardStream:
    r"""A text stream that counts failed writes; all other methods are the wrapped stream's.

    A character that the stream's encoding lacks is written as its escape (`\u2013`).

    Args:
        stream: The wrapped stream.
        name: Name for messages.
        required: Whether a failed write raises OutputError; otherwise it is only counted.
        missing: Whether the process started without this stream, so that every write fails.

    Attributes:
        required: See above.
        failed: Number of failed writes and flushes.
        reason: Why the first of them failed.
    """

    def __init__(self, stream: TextIO, name: str, *, required: bool, missing: bool = False) -> None:
        self._stream, self._name, self._missing = stream, name, missing
        self.required = required
        self.failed, self.reason = 0, ""
        self._lost: OutputError | None = None
        self._timeout = _STALL_SECONDS

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        """Write text, and return its length, also where the write failed.

        Args:
            text: The text.

        Raises:
            OutputError: The write failed, and the stream is required.
        """
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
        """Raise TimeoutError where a write would block on a stalled reader, and the stream is not required."""
        if self.required:
            return
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # no descriptor, or a closed stream: the write fails
            return
        if not has_room(descriptor, self._timeout):
            self._timeout = 0.0
            raise TimeoutError(errno.ETIMEDOUT, "its reader is stalled")
        self._timeout = _STALL_SECONDS

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream.

        Raises:
            OutputError: This or an earlier write failed, and the stream is required.
        """
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)
        if self.required and self._lost is not None:  # another caller caught the first one
            raise self._lost

    def describe(self) -> str | None:
        """Return how many writes failed and why; None where none did."""
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
    """Replace sys.stdout and sys.stderr by `StandardStream`s while the body runs; sys.stdout is required.

    Descriptors 0, 1 and 2 that were closed when the process started are opened on /dev/null. Otherwise a file that is
    opened later would take their number, and get what libraries print.

    Yields:
        Standard output; that of an enclosing call where there is one.
    """
    with contextlib.ExitStack() as closing:
        _fill_closed_descriptors()
        for name in _NAMES:
            # sys.__stderr__, too: the watchdog of hanging ranks writes there.
            for attribute in (name, f"__{name}__"):
                closing.enter_context(_replaced(attribute, _NAMES[name], required=name == "stdout"))
        try:
            yield cast(StandardStream, sys.stdout)
        finally:
            for name in _NAMES:
                with contextlib.suppress(OutputError):  # raised already by an earlier flush
                    getattr(sys, name).flush()


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Make failed writes to standard output and standard error harmless, during the body and afterwards."""
    with standard_streams() as stdout, log_run_to_stderr():
        # Not restored: the rest of its buffer would fail again at exit, and change the exit code.
        stdout.required = cast(StandardStream, sys.__stdout__).required = False
        yield


def lost_output() -> list[str]:
    """Return a line for each standard stream with failed writes."""
    return [line for name in _NAMES if (line := getattr(getattr(sys, name), "describe", _nothing)())]


def write_from_handler(text: str) -> None:
    """Write a line to standard error in a signal handler, where `print` is not reentrant.

    It is dropped where it would block on a stalled reader.

    Args:
        text: The line.
    """
    with contextlib.suppress(OSError, ValueError):
        if has_room(2, 0):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def write_lines(text: str) -> None:
    """Write lines to standard error, so that other processes' lines do not split them.

    Lines are written in groups of at most 4096 bytes, each by one system call. It does not block for long on a stalled
    reader.

    Args:
        text: The lines.
    """
    group = b""
    for line in [*io.BytesIO(text.encode(errors="backslashreplace")), b""]:
        if group and (not line or len(group) + len(line) > _GROUP_BYTES):
            with contextlib.suppress(OSError, ValueError):
                if has_room(2, _STALL_SECONDS):
                    os.write(2, group)
            group = b""
        group += line[:_GROUP_BYTES]


def has_room(descriptor: int, seconds: float) -> bool:
    """Return whether a write of at most 4096 bytes would not block; True for files.

    Args:
        descriptor: File descriptor.
        seconds: Timeout of the poll.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(1000 * seconds))


def reason(error: BaseException) -> str:
    """Return an error's reason as text, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _nothing() -> None:
    return None


@contextlib.contextmanager
def _replaced(attribute: str, name: str, *, required: bool) -> Iterator[None]:
    before = getattr(sys, attribute)
    if isinstance(before, StandardStream):
        yield
        return
    own = attribute.strip("_")
    now = getattr(sys, own)
    if isinstance(now, StandardStream) and (before is None or before is now._stream):
        stream = now
    elif before is None:
        file = open(1 if own == "stdout" else 2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        stream = StandardStream(file, name, required=required, missing=True)
    else:
        stream = StandardStream(before, name, required=required)
    setattr(sys, attribute, stream)
    try:
        yield
    finally:
        if getattr(sys, attribute) is stream:
            setattr(sys, attribute, before)


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
    """Redirect a failed stream to /dev/null at exit: its buffer would fail again, with a traceback and code 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
