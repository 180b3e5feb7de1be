"""Quoting of a user's text for a job script: `#SBATCH` lines, which sbatch parses by its own rules, and shell words.

Text that cannot be quoted so that it is read back unchanged is refused, with the option it was given to.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from pause_megatron.errors import ConfigError

_BLANKED = re.compile("packjob|hetjob", re.IGNORECASE)  # sbatch overwrites them in every line, quoted or not
_LONGEST_NAME = 200  # bytes of 255 in a file name, which also holds the job id and a suffix
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./^\[\]{}~!?*$&;()<>|`-]*")


def printable(text: str, option: str) -> str:
    """Check that a text is one printable line, and return it.

    Args:
        text: A user's text.
        option: Name of the option it was given to.

    Raises:
        ConfigError: The text has a control character, such as a line break, or bytes that are not UTF-8.
    """
    for character in text:
        # Control characters; line and paragraph separators; surrogates, which stand for undecodable bytes.
        if unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs"):
            raise ConfigError(f"{option}: expected one line of text without control characters, got {text!r}")
    return text


def directive(name: str, value: object, option: str | None = None) -> str:
    """Return `--name=VALUE` quoted for an `#SBATCH` line.

    In such a line a backslash escapes the next character, also within quotes of either kind. Blanks end a word, and
    `#` ends the line.

    Args:
        name: Name of sbatch's option, without dashes.
        value: Its value.
        option: Name of the user's option; default: `--name`.

    Raises:
        ConfigError: sbatch would not read the value back unchanged.
    """
    option = option or f"--{name}"
    text = printable(str(value), option)
    _refuse_blanked(text, option)
    if not _PLAIN.fullmatch(text):
        text = '"' + re.sub(r'([\\"])', r"\\\1", text) + '"'
    return f"--{name}={text}"


def job_name(text: str, option: str = "--name") -> str:
    """Check that a text can be a job's name, which becomes part of file names, and return it.

    Args:
        text: The name.
        option: Name of the option it was given to.

    Raises:
        ConfigError: The name is too long, or has a character with a meaning in paths or in SLURM's file name patterns.
    """
    if special := sorted(set(printable(text, option)) & set("/\\%")):
        raise ConfigError(
            f"{option}: expected a name without {' '.join(special)}, as files are named by it, got {text!r}"
        )
    if (size := len(text.encode(errors="surrogatepass"))) > _LONGEST_NAME:
        raise ConfigError(
            f"{option}: expected a name of at most {_LONGEST_NAME} bytes, as files are named by it, got {size}: "
            f"{text[:20]}..."
        )
    return text


def further_line(text: str, option: str = "--sbatch") -> str:
    """Check a user's own `#SBATCH` line, given without that word, and return it.

    Args:
        text: Options as sbatch reads them.
        option: Name of the option it was given to.

    Raises:
        ConfigError: The line does not start with an option, or has a quote that is not closed.
    """
    text = printable(text, option).strip()
    if not text.startswith("-"):
        raise ConfigError(f"{option}: expected an option of sbatch, such as --qos=high, got {text!r}")
    _refuse_blanked(text, option)
    for word in words_of_line(text, option):
        if word.startswith("--job-name="):
            job_name(word.partition("=")[2], option)
    return text


def words_of_line(text: str, option: str) -> Iterator[str]:
    """Split an `#SBATCH` line into words, as sbatch does.

    Args:
        text: The line, without `#SBATCH`.
        option: Name of the option it was given to.

    Yields:
        Each word without its quotes.

    Raises:
        ConfigError: A quote is not closed.
    """
    word, quote, escaped, begun = "", "", False, False
    for character in text:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = begun = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "'\"":
            quote, begun = character, True
        elif character == "#":
            break
        elif character.isspace():
            if begun:
                yield word
            word, begun = "", False
        else:
            word, begun = word + character, True
    if quote:
        raise ConfigError(f"{option}: expected each quote to be closed, got {text!r}")
    if begun:
        yield word


def _refuse_blanked(text: str, option: str) -> None:
    if _BLANKED.search(text):
        raise ConfigError(f"{option}: expected no 'hetjob' or 'packjob', which sbatch erases, got {text!r}")
