"""Text of a user's in a job script: in `#SBATCH` lines, which sbatch reads by rules of its own, and in shell words.

Whatever cannot be written so that it comes back as it was is refused, with the option that it was given to.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from pause_megatron.errors import ConfigError

_BLANKED = re.compile("packjob|hetjob", re.IGNORECASE)  # sbatch overwrites them in every line, quoted or not
_LONGEST_NAME = 200  # bytes; file names have 255, and get a job's number and endings
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./^\[\]{}~!?*$&;()<>|`-]*")


def printable(text: str, option: str) -> str:
    """The text, if it is one line that every program reads alike.

    Args:
        option: what the user calls it.

    Raises:
        ConfigError: a control character (a line break begins a line of the script), or bytes that are no UTF-8.
    """
    for character in text:
        # Controls; line and paragraph separators; halves of characters, which stand for undecodable bytes.
        if unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs"):
            raise ConfigError(f"{option}: expected one line of text without control characters, got {text!r}")
    return text


def directive(name: str, value: object, option: str | None = None) -> str:
    """`--name=VALUE` as it stands in an `#SBATCH` line.

    There a backslash takes the meaning from the next character, also within either kind of quotes; blanks end a word
    and `#` the line.

    Args:
        option: what the user calls it; default: `--name`.

    Raises:
        ConfigError: a value that sbatch would not read as it is.
    """
    option = option or f"--{name}"
    text = printable(str(value), option)
    _refuse_blanked(text, option)
    if not _PLAIN.fullmatch(text):
        text = '"' + re.sub(r'([\\"])', r"\\\1", text) + '"'
    return f"--{name}={text}"


def job_name(text: str, option: str = "--name") -> str:
    """The name of a job, which becomes part of file names.

    Raises:
        ConfigError: a character that means something in a path or in SLURM's patterns of file names, or too many.
    """
    if found := sorted(set(printable(text, option)) & set("/\\%")):
        raise ConfigError(
            f"{option}: expected a name without {' '.join(found)}, as files are named by it, got {text!r}"
        )
    if (size := len(text.encode(errors="surrogatepass"))) > _LONGEST_NAME:
        raise ConfigError(
            f"{option}: expected a name of at most {_LONGEST_NAME} bytes, as files are named by it, got {size}: "
            f"{text[:20]}..."
        )
    return text


def further_line(text: str, option: str = "--sbatch") -> str:
    """A user's own `#SBATCH` line, without that word: options as sbatch reads them.

    Raises:
        ConfigError: no option, or a quote that is not closed.
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
    """The words of an `#SBATCH` line, as sbatch reads them.

    Raises:
        ConfigError: a quote that is not closed.
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
