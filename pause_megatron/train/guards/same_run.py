"""What must be the same on every rank of a run: configuration, DeepSpeed's settings, code, data, and what decides bits.

Ranks compare it before the first step (`distributed.agreement`). Left out is what is a rank's own: the paths of
`config.identity.LOCAL_KEYS`, whose content is compared, and the number of threads.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import pause_megatron
from pause_megatron.config.batching import batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.identity import compared_keys, corpus_names
from pause_megatron.config.model_from import checkpoint_config
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.corpus.corpora import Corpora
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.errors import ConfigError

PACKAGE = Path(pause_megatron.__file__).parent
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "triton", "transformer-engine")
_VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "NVIDIA_TF32_OVERRIDE"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_PREFIXES = ("NVTE_",)
_STDLIB = sysconfig.get_path("stdlib")
_INSTALLED = frozenset(("site-packages", "dist-packages"))
_WINDOWS, _TOKENS = 4, 100  # made-up windows, and how many tokens are in them


def run_record(verb: str, config: ResolvedConfig, world_size: int) -> dict[str, str]:
    """Name -> value of all that must be the same but the data.

    Args:
        verb: that this rank runs.
        config: resolved.
        world_size: ranks in all.

    Raises:
        ConfigError: batches or DeepSpeed settings that contradict each other.
    """
    record = {"verb": verb} | {key: _text(value) for key, value in compared_keys(config).items()}
    # Folders are those that the paths lead to from here.
    record["run.dir"] = _text(os.path.realpath(config.run.dir))
    if config.model.from_ is not None:
        record["model.from"] = _text(os.path.realpath(config.model.from_))
        record["content of model.from"] = _manifest(config.model.from_)
    if ":" in config.pause.placement:
        record |= _policy(config)
    engine = deepspeed_config(config, data_parallel=batch_plan(config, world_size).data_parallel)
    record |= {f"{key} for DeepSpeed": _text(value) for key, value in _flat(engine)}
    record["version of pause-megatron"] = f"{pause_megatron.__version__}, sources {code_digest()}"
    record["version of Python"] = ".".join(platform.python_version_tuple()[:2])
    record |= {f"version of {name}": _version(name) for name in _PACKAGES}
    return record | environment_record(os.environ)


def corpora_record(corpora: Corpora) -> dict[str, str]:
    """What is in the corpora of a run, wherever they lie."""
    valid = [corpus.manifest.fingerprint for corpus in corpora.valid]
    return {
        "content of data.prefix": corpora.fingerprint,
        "names in data.prefix": _text(corpus_names(str(corpus.prefix) for corpus in corpora.corpora)),
        "content of data.valid_prefix": _text(valid),
        "names in data.valid_prefix": _text(corpus_names(str(corpus.prefix) for corpus in corpora.valid)),
        "content of data.tokenizer": corpora.tokenizer.fingerprint,
    }


def environment_record(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide bits, or how ranks sum."""
    names = {*_VARIABLES, *(name for name in environment if name.startswith(_PREFIXES))}
    return {f"variable {name}": environment.get(name, "not set") for name in sorted(names)}


def code_digest(package: Path = PACKAGE) -> str:
    """Of the names and bytes of a package's sources."""
    digest = xxhash.xxh3_128()
    for path in _sources(package):
        try:
            # One that is neither a file nor a folder may give nothing, or never end.
            content = path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else b"no file"
        except OSError as error:
            content = f"cannot be read: {error.strerror}".encode()
        digest.update(os.fsencode(path.relative_to(package)) + f" {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(package: Path) -> list[Path]:
    """What is called *.py, and folders that cannot be looked into; without what is hidden, such as editors' locks."""
    found: list[Path] = []

    def unseen(error: OSError) -> None:
        found.append(Path(error.filename))

    for folder, folders, files in os.walk(package, onerror=unseen):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found.extend(Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("."))
    return sorted(found)


def _text(value: Any) -> str:
    """A value as a message shows it."""
    return repr(list(value) if isinstance(value, tuple) else value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _manifest(path: str) -> str:
    """Of a checkpoint: its manifest has the digests of all else. A run that goes on may have lost it."""
    try:
        return _digest(checkpoint_config(path).parent / "manifest.json")
    except ConfigError:
        return "not there"


def _policy(config: ResolvedConfig) -> dict[str, str]:
    """Of a placement policy of the user's own: its sources, and what it does, which data files decide as well."""
    name, before = config.pause.placement, set(sys.modules)
    places = _places(config)  # first, since a policy may import what it needs when it is called
    return {f"source of {name}": _loaded(name.partition(":")[0], before), f"pauses by {name}": places}


def _places(config: ResolvedConfig) -> str:
    """Of the gaps in some made-up windows."""
    pause, digest = config.pause, xxhash.xxh3_128()
    try:
        plan = PausePlan(config.data.sequence_length, pause.rate, pause.window, pause.placement, pause.seed)
        injector = PauseInjector(plan, range(1), "", "")
        text = np.arange(plan.text_length, dtype=np.int64) % _TOKENS
        for sample in range(_WINDOWS):
            gaps = injector.gaps(text, sample)
            digest.update(f"{gaps.size} ".encode() + gaps.tobytes())
    except Exception as error:  # what is wrong with it is said where the windows of the run are made
        return f"no places, but {type(error).__name__}"
    return digest.hexdigest()


def _loaded(module: str, before: set[str]) -> str:
    """Of the files of a module, of its package, and of what it has imported that nobody has installed."""
    top = sys.modules.get(module.partition(".")[0])
    if module not in sys.modules or top is None:
        return "not found"
    at = [*getattr(top, "__path__", ()), getattr(top, "__file__", None)][0]
    folder, digest = Path(at or ".").parent, xxhash.xxh3_128()
    for name, file in sorted(_files()):
        of_it = name == module or f"{name}.".startswith(f"{top.__name__}.")
        installed = file.is_relative_to(_STDLIB) or not _INSTALLED.isdisjoint(file.parts)
        if of_it or (not installed and (name not in before or file.is_relative_to(folder))):
            digest.update(f"{name} {_digest(file)}\n".encode())
    return digest.hexdigest()


def _files() -> Iterator[tuple[str, Path]]:
    """Name and file of each module that is loaded and not of this package."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and not Path(file).is_relative_to(PACKAGE):
            yield name, Path(file)


def _digest(path: Path) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
