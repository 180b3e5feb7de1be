"""Paths as users type them: one type for every configuration key and option that takes a path.

A leading `~` or `~user` is expanded to the home folder: bash expands it only at the start of a word (not in
`run.dir=~/x`), YAML never. Relative paths stay relative. Environment variables are not expanded, since `$` is a valid
character of a file name; the shell expands them in double quotes. A file named `~x` is `./~x`.
"""

from __future__ import annotations

import argparse
import glob
import os
import unicodedata

_MOST_NAME_BYTES = 255
_MOST_PATH_BYTES = 4095
# Control characters, surrogates (bytes that are not UTF-8), and characters that some programs take for line ends.
_REFUSED = ("Cc", "Cs", "Zl", "Zp")


def expanded(text: str) -> str:
    """Return a path with a leading `~` or `~user` expanded to the home folder.

    Args:
        text: The path as typed.

    Raises:
        ValueError: The path is empty, of an unknown user, has control characters, or a name that is too long.
    """
    if not text:
        raise ValueError("expected a path, got nothing; the current folder is '.'")
    path = text
    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        path = _home(user) + slash + rest
    _check(path)
    return path


def expanded_pattern(text: str) -> str:
    """Return a path or glob with `~` expanded as in `expanded`; the home folder's name is no pattern.

    Args:
        text: The path or glob as typed.

    Raises:
        ValueError: See `expanded`.
    """
    user, slash, rest = text.partition("/")
    if text.startswith("~") and glob.has_magic(rest):
        return glob.escape(expanded(user)) + slash + rest
    return expanded(text)


def path_option(text: str) -> str:
    """Convert an option or positional argument that takes a path (argparse type)."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def pattern_option(text: str) -> str:
    """Convert an option that takes a path or a glob (argparse type)."""
    try:
        return expanded_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def prefix_option(text: str) -> str:
    """Convert an option that takes a PREFIX of file names (argparse type)."""
    prefix = path_option(text)
    if os.path.basename(prefix) in ("", ".", "..") or (text.startswith("~") and "/" not in text):
        raise argparse.ArgumentTypeError(
            f"expected the beginning of file names, such as data/c4 for data/c4.bin, got the folder {text!r}"
        )
    return prefix


def _home(user: str) -> str:
    folder = os.path.expanduser(user)
    if user == "~" and not os.path.isabs(os.environ.get("HOME", folder)):
        raise ValueError("expected a home folder for ~, got none (HOME is not absolute, and the user is unknown)")
    if folder == user:
        raise ValueError(f"expected a user's name after ~, got {user[1:]!r}, no such user; for a file, write ./{user}")
    return folder


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
