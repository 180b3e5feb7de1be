"""Metrics of one's own: what a function reads, its checked score, and the digest of its code.

The names of the parameters say what a function reads:

    def starts_right(prediction, references): ...         # a decoded answer
    def margin(log_likelihoods, choices, gold): ...       # log-likelihoods of choices
"""

from __future__ import annotations

import ast
import functools
import inspect
import marshal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pause_megatron.config.user_code import raised_at
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.digest import Hasher, bytes_digest

Reads = Literal["text", "choices"]
PARAMETERS: dict[Reads, tuple[str, ...]] = {
    "text": ("prediction", "references"),
    "choices": ("log_likelihoods", "choices", "gold"),
}
"""The parameters of a metric, by what it reads."""

_DIGESTS: dict[int, tuple[Callable[..., Any], str]] = {}  # by identity: a callable need not be hashable
_INSTALLED = {"site-packages", "dist-packages"}


def reads_of(function: object, name: str) -> Reads:
    """Return what a function reads, by the names of its parameters.

    Args:
        function: The function.
        name: Its name in messages.

    Raises:
        ConfigError: It is no function, or has other parameters.
    """
    if isinstance(function, type) or not callable(function):
        what = f"the class {function.__name__}" if isinstance(function, type) else repr(function)
        raise ConfigError(f"{name}: expected a function, got {what}")
    forms = " or ".join(f"({', '.join(names)})" for names in PARAMETERS.values())
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        raise ConfigError(
            f"{_place(function, name)}: expected the parameters {forms}, got none that are known"
        ) from None
    needed = {each.name for each in signature.parameters.values() if each.default is each.empty}
    for reads, names in PARAMETERS.items():
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        positional = [each.name for each in signature.parameters.values() if each.kind in kinds][: len(names)]
        if tuple(positional) == names and needed <= set(names):
            return reads
    raise ConfigError(f"{_place(function, name)}: expected the parameters {forms}, got {signature}")


def checked(function: Callable[..., Any], name: str) -> Callable[..., float]:
    """Return the function with its score checked: a number in [0, 1].

    Args:
        function: The metric.
        name: Its name in messages.
    """

    @functools.wraps(function)
    def score(*arguments: Any) -> float:
        try:
            value = function(*arguments)
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            raise DataError(
                f"{raised_at(error) or _place(function, name)}: metric {name}: expected a score, got "
                f"{type(error).__name__}: {error}, for {_shown(arguments)}"
            ) from error
        try:
            number = float("nan") if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not 0.0 <= number <= 1.0:
            raise DataError(
                f"{_place(function, name)}: metric {name}: expected a number in [0, 1], got {value!r}, "
                f"for {_shown(arguments)}"
            )
        return number

    return score


def code_digest(function: Callable[..., Any]) -> str:
    """Return the digest of a metric's code at its first use: its file, and the files of that folder that it imports.

    A function without a file, as of a notebook, is digested by its compiled code. Data files are not in it.

    Args:
        function: The function.
    """
    known = _DIGESTS.get(id(function))
    if known is None or known[0] is not function:
        known = _DIGESTS[id(function)] = function, _digest(function)
    return known[1]


def _digest(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return bytes_digest(f"{code_digest(function.func)} {function.args} {function.keywords}".encode())
    bodies = [each if hasattr(each, "__globals__") else type(each).__call__ for each in _unwrapped(function)]
    files = _sources([getattr(body, "__globals__", {}) for body in bodies])
    hasher = Hasher(getattr(function, "__qualname__", "").encode())
    for name in sorted(files):
        hasher.update(f"{name}\0{bytes_digest(files[name])}\0".encode())
    if not files:
        code = getattr(bodies[-1], "__code__", None)
        hasher.update(repr(function).encode() if code is None else marshal.dumps(code))
    return hasher.digest


def _unwrapped(function: Any) -> list[Any]:
    """Return a function and those that it wraps."""
    chain = [function]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    return chain


def _sources(namespaces: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return the files of namespaces, and those beside and below the last one's that they import."""
    first = namespaces[-1].get("__file__")
    if not first or not Path(first).is_file():
        return {}
    folder, found = Path(first).resolve().parent, dict[str, bytes]()
    waiting = [Path(namespace.get("__file__") or "").resolve() for namespace in namespaces if not _ships(namespace)]
    while waiting:
        path = waiting.pop()
        if not path.is_file() or not path.is_relative_to(folder):
            continue
        relative = path.relative_to(folder)
        if relative.as_posix() in found or (found and (_INSTALLED & {*relative.parts, folder.name})):
            continue
        found[relative.as_posix()] = path.read_bytes()
        waiting += _imported(found[relative.as_posix()], path.parent, folder)
    return found


def _ships(namespace: dict[str, Any]) -> bool:
    return str(namespace.get("__name__", "")).partition(".")[0] == "pause_megatron"


def _imported(source: bytes, *folders: Path) -> Iterator[Path]:
    """Yield the files of folders that a module may import, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"{node.module}." if node.module else ""
            names = [module.rstrip("."), *(f"{module}{alias.name}" for alias in node.names)]
        for name in filter(None, names):
            for folder in folders:
                stem = folder / name.replace(".", "/")
                yield from (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")


def _place(function: Any, name: str) -> str:
    """Return FILE:LINE of a function, or its name."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else name


def _shown(arguments: tuple[Any, ...]) -> str:
    text = ", ".join(map(repr, arguments))
    return f"({text})" if len(text) <= 160 else f"({text[:160]}...)"
