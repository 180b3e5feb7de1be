"""Reading lines of UTF-8 text from user files."""

from __future__ import annotations

import codecs

from pause_megatron.errors import DataError

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins like UTF-16's, so it is checked first
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def lines_of(content: bytes, where: str) -> list[str]:
    r"""Split UTF-8 text into lines without their ends. A leading byte order mark is dropped.

    A line ends with \n or \r\n; the last one may also end with the file. `str.splitlines` would also split at form
    feeds and at U+2028, which are characters of the text.

    Args:
        content: Content of a file.
        where: Name of the file, for messages.

    Raises:
        DataError: UTF-16 or UTF-32, bytes that are not UTF-8, or NULs; the message names the line.
    """
    for mark, name in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise DataError(f"{where}: expected UTF-8, got {name}; convert it: iconv -f {name} -t UTF-8 FILE")
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [_text(line.removesuffix(b"\r"), f"{where}:{number}") for number, line in enumerate(lines, 1)]


def _text(line: bytes, where: str) -> str:
    if b"\0" in line:
        raise DataError(f"{where}: expected text, got a NUL byte at {line.index(0)} (UTF-16, or no text file)")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, got the byte {line[error.start]:#04x} at {error.start} of the line"
        ) from None
