"""Code of the user's that a configuration names: its files, and whether a checkpoint was trained with the same."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import pause_megatron
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.files.digest import file_digest

SOURCES = "sources.json"
"""File of a checkpoint: digests of the user's modules by name. A run of shipped code only has none."""

PACKAGE = Path(pause_megatron.__file__).parent
_STDLIB = sysconfig.get_path("stdlib")
_INSTALLED = frozenset(("site-packages", "dist-packages"))


def own_names(config: ResolvedConfig) -> dict[str, str]:
    """Return the keys that name code of the user's, with their values `module:attribute`.

    Args:
        config: Configuration of the run.
    """
    named = {
        "objective.name": config.objective.name,
        "objective.token_weights": config.objective.token_weights,
        "pause.placement": config.pause.placement,
        "finetune.answer_placement": config.finetune.answer_placement,
    }
    return {key: name for key, name in named.items() if name is not None and ":" in name}


def modules_of(module: str, before: set[str]) -> dict[str, Path] | None:
    """Return the files of a module, its package, and the modules outside site-packages that it imported, by module.

    Args:
        module: Name of the module.
        before: Modules that were loaded before it. Of them, those in its folder count.

    Returns:
        None where it is not loaded.
    """
    top = sys.modules.get(module.partition(".")[0])
    if module not in sys.modules or top is None:
        return None
    at = [*getattr(top, "__path__", ()), getattr(top, "__file__", None)][0]
    folder, found = Path(at or ".").parent, {}
    for name, file in sorted(_loaded_files()):
        own = name == module or f"{name}.".startswith(f"{top.__name__}.")
        installed = file.is_relative_to(_STDLIB) or not _INSTALLED.isdisjoint(file.parts)
        if own or (not installed and (name not in before or file.is_relative_to(folder))):
            found[name] = file
    return found


def digest_of(path: Path) -> str:
    """Return the digest of a file, or why it cannot be read.

    Args:
        path: The file.
    """
    try:
        return file_digest(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def own_sources(config: ResolvedConfig) -> dict[str, str]:
    """Return digests of the user's modules that a run uses, by name: those named, their packages and folders.

    Args:
        config: Configuration of a run that has imported them.
    """
    files: dict[str, Path] = {}
    for name in own_names(config).values():
        files |= modules_of(name.partition(":")[0], before=set(sys.modules)) or {}
    return {module: digest_of(file) for module, file in sorted(files.items()) if module != "__main__"}


def sources_file(sources: Mapping[str, str]) -> dict[str, bytes]:
    """Return the file of a checkpoint with these digests, by its name; nothing where there are none.

    Args:
        sources: What `own_sources` returned.
    """
    return {SOURCES: json.dumps(sources, indent=1).encode()} if sources else {}


def changed_sources(checkpoint: Path, config: ResolvedConfig, sources: Mapping[str, str]) -> str | None:
    """Return a line about the user's modules that are not those which a checkpoint was trained with.

    Modules that only one of the two names are left out: what is loaded may depend on how a run is started.

    Args:
        checkpoint: Folder of the complete checkpoint.
        config: Configuration of the run.
        sources: What `own_sources` returned.

    Returns:
        None where they are the same, and where the checkpoint has no digests.
    """
    if not sources or not (checkpoint / SOURCES).is_file():
        return None
    before: dict[str, str] = json.loads((checkpoint / SOURCES).read_text(encoding="utf-8"))
    changed = [name for name in sources if name in before and before[name] != sources[name]]
    if not changed:
        return None
    keys = ", ".join(f"{key}={name}" for key, name in own_names(config).items())
    what = "; ".join(f"module {name}: {before[name]} in the checkpoint, {sources[name]} now" for name in changed)
    return f"{checkpoint}: expected the code of {keys} as the checkpoint was trained with, got {what}; the run uses it"


def _loaded_files() -> Iterator[tuple[str, Path]]:
    """Yield name and file of each loaded module outside this package."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and not Path(file).is_relative_to(PACKAGE):
            yield name, Path(file)
