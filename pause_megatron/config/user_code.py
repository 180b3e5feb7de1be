"""Import of a user's code by 'module:attribute', also from the folder of a task file; errors name file and line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError, PauseMegatronError
from pause_megatron.files.digest import bytes_digest

_PACKAGE = str(Path(__file__).resolve().parents[1])
_BY_PATH: dict[tuple[Path, str], ModuleType] = {}
"""Modules that were executed from a file, by path and content."""


def import_attribute(name: str, folders: Sequence[Path] = ()) -> Any:
    """Return what 'module:attribute' names.

    Args:
        name: The name.
        folders: Folders that are searched before the import path; the first one that has the module counts.

    Raises:
        ConfigError: There is no such module or attribute, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ConfigError(f"expected 'module:attribute', got {name!r}")
    module = _import(module_name, folders)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            known = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            place = getattr(module, "__file__", None) or module_name
            # A module that makes its attributes says which ones it can make.
            made = f" ({error})" if hasattr(found, "__getattr__") else ""
            suggestion = nearest(part, known) + made
            raise ConfigError(f"{place}: expected {part!r} in the module, got none{suggestion}") from None
    return found


def import_for_key(key: str, name: str, expected: str) -> Any:
    """Return what the 'module:attribute' of a configuration key names.

    Args:
        key: The key.
        name: Its value.
        expected: What is allowed.

    Raises:
        ConfigError: As `import_attribute`, with the key.
    """
    message = f"{key}: expected {expected}, got {name!r}"
    if ":" not in name:
        raise ConfigError(message)
    try:
        return import_attribute(name)
    except ConfigError as error:
        raise ConfigError(f"{message}: {error}") from None


def check_arguments(place: str, function: Callable[..., Any], *arguments: str) -> None:
    """Check that a user's function can be called, by its signature; some functions of C code have none.

    Args:
        place: Key and value, for messages.
        function: The function.
        arguments: What it is called with.

    Raises:
        ConfigError: It takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{place}: expected a function of ({', '.join(arguments)}), got {signature}: {error}"
        ) from None


@contextlib.contextmanager
def calling(place: str) -> Iterator[None]:
    """Raise what a user's code raises as a ConfigError that names the key, file and line; ours are passed on.

    Args:
        place: Key and value, for messages.
    """
    try:
        yield
    except PauseMegatronError:
        raise
    except Exception as error:
        at = raised_at(error)
        raised = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{place}: expected a result, got {raised}" + (f" ({at})" if at else "")) from error


def raised_at(error: BaseException) -> str:
    """Return FILE:LINE at which a user's code raised, or "".

    Args:
        error: What it raised.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_PACKAGE) and not file.startswith("<frozen"):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _import(name: str, folders: Sequence[Path]) -> ModuleType:
    """Return a module: that of a folder by its file, so that two folders may have modules of one name; else by name."""
    file = next((path for folder in folders if (path := folder / f"{name.replace('.', '/')}.py").is_file()), None)
    known = sys.modules.get(name)
    try:
        if not folders:
            return importlib.import_module(name)
        if file is None or "." in name:
            return _with_path(folders, lambda: importlib.import_module(name))
        if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == file.resolve():
            return known
        key = (file.resolve(), bytes_digest(file.read_bytes()))
        if key not in _BY_PATH:
            _BY_PATH[key] = _with_path([file.parent], lambda: _execute(name, file))
        return _BY_PATH[key]
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise ConfigError(f"{file or name}: cannot be imported ({error})") from None
        searched = [*dict.fromkeys(str(folder.absolute()) for folder in folders)] or ["this folder"]
        raise ConfigError(f"expected the module {name} in {' or '.join(searched)} or on PYTHONPATH, got none") from None
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        place = raised_at(error) or str(file or name)
        raise ConfigError(f"{place}: cannot be imported ({type(error).__name__}: {error})") from None


def _with_path(folders: Sequence[Path], load: Callable[[], ModuleType]) -> ModuleType:
    """Return what `load` imports while folders are at the end of the import path."""
    before = list(sys.path)
    sys.path += [str(folder.absolute()) for folder in folders]
    importlib.invalidate_caches()
    try:
        return load()
    finally:
        sys.path[:] = before


def _execute(name: str, file: Path) -> ModuleType:
    """Return the module of a file under a name that hides no other module."""
    private = f"{name}@{file.resolve()}"
    spec = importlib.util.spec_from_file_location(private, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses of the module look for it there
    spec.loader.exec_module(module)
    return module
