"""Paths as people write them: one type for every key and option that takes one. No torch.

`~` and `~user` at the beginning stand for home folders: bash expands them only at the start of a word (not in
`run.dir=~/x`), YAML never. Relative paths stay relative. Environment variables are not expanded, since `$` is a letter
like any other in a file's name: the shell does it, in double quotes. A file that is itself called `~x` is `./~x`.
"""

from __future__ import annotations

import argparse
import glob
import os
import unicodedata

_MOST_NAME_BYTES = 255
_MOST_PATH_BYTES = 4095
# Control characters, halves of characters (bytes that are not UTF-8), and what some programs take for ends of lines.
_REFUSED = ("Cc", "Cs", "Zl", "Zp")


def expanded(text: str) -> str:
    """A path with `~` and `~user` at its beginning replaced by the home folder; anything else as it is.

    Raises:
        ValueError: empty, a user that does not exist, characters that do not belong into a path, or a name that is
            longer than any file system takes.
    """
    if not text:
        raise ValueError("expected a path, got nothing; the folder in which you are is '.'")
    found = text
    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        found = _home(user) + slash + rest
    _check(found)
    return found


def expanded_pattern(text: str) -> str:
    """As `expanded`, of a path or a glob: what a home folder is called is no pattern.

    Raises:
        ValueError: see `expanded`.
    """
    user, slash, rest = text.partition("/")
    if text.startswith("~") and glob.has_magic(rest):
        return glob.escape(expanded(user)) + slash + rest
    return expanded(text)


def path_option(text: str) -> str:
    """The type of every option and positional argument that takes a path (argparse)."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def pattern_option(text: str) -> str:
    """The type of options that take paths or globs (argparse)."""
    try:
        return expanded_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def prefix_option(text: str) -> str:
    """The type of options that take a PREFIX of file names (argparse)."""
    found = path_option(text)
    if os.path.basename(found) in ("", ".", "..") or (text.startswith("~") and "/" not in text):
        raise argparse.ArgumentTypeError(
            f"expected the beginning of file names, such as data/c4 for data/c4.bin, got the folder {text!r}"
        )
    return found


def _home(user: str) -> str:
    found = os.path.expanduser(user)
    if user == "~" and not os.path.isabs(os.environ.get("HOME", found)):
        raise ValueError("expected a home folder for ~, got none (HOME is not a whole path, and the user is not known)")
    if found == user:
        raise ValueError(f"expected a user's name after ~, no user is called {user[1:]!r}; a file's name is ./{user}")
    return found


def _check(path: str) -> None:
    for place, letter in enumerate(path):
        if unicodedata.category(letter) in _REFUSED:
            raise ValueError(f"expected a path, got {path[:200]!r} with the character U+{ord(letter):04X} at {place}")
    longest = max(path.split("/"), key=lambda name: len(name.encode()))
    if (length := len(longest.encode())) > _MOST_NAME_BYTES:
        raise ValueError(
            f"expected names of at most {_MOST_NAME_BYTES} bytes, got one of {length}: {longest[:60]!r}..."
        )
    if len(path.encode()) > _MOST_PATH_BYTES:
        raise ValueError(f"expected a path of at most {_MOST_PATH_BYTES} bytes, got {len(path.encode())}")
