"""What must be the same on every rank of a run: configuration, DeepSpeed settings, code, data, numerical environment.

Ranks compare it before the first step (`distributed.agreement`). What may differ is left out: the paths of
`config.identity.LOCAL_KEYS`, whose content is compared instead, and the number of threads.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
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
from pause_megatron.data.supervised.answers import AnswerPauses
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.data.windows.token_texts import TokenTextTable
from pause_megatron.errors import ConfigError
from pause_megatron.objective import loss_plan
from pause_megatron.train.guards.own_code import PACKAGE, digest_of, modules_of
from pause_megatron.versions import installed_version

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "triton", "transformer-engine")
_VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "NVIDIA_TF32_OVERRIDE"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_PREFIXES = ("NVTE_",)
_WINDOWS, _TOKENS = 4, 100  # synthetic windows, and the size of their vocabulary


def run_record(verb: str, config: ResolvedConfig, world_size: int) -> dict[str, str]:
    """Return name -> value of all that must be the same on every rank, except the data.

    Args:
        verb: Verb of the command line that this rank runs.
        config: Configuration of the run.
        world_size: Ranks in all.

    Raises:
        ConfigError: Batch sizes or DeepSpeed settings contradict each other.
    """
    record = {"verb": verb} | {key: _text(value) for key, value in compared_keys(config).items()}
    # The folders that the paths resolve to on this rank.
    record["run.dir"] = _text(os.path.realpath(config.run.dir))
    if config.model.from_ is not None:
        record["model.from"] = _text(os.path.realpath(config.model.from_))
        record["content of model.from"] = _manifest(config.model.from_)
    if ":" in config.pause.placement:
        record |= _policy(config.pause.placement, lambda: _window_gaps(config))
    answers = config.finetune.answer_placement
    if answers is not None and ":" in answers:
        record |= _policy(answers, lambda: _answer_gaps(config, answers), "in answers ")
    record |= _objective(config)
    engine = deepspeed_config(config, data_parallel=batch_plan(config, world_size).data_parallel)
    record |= {f"{key} for DeepSpeed": _text(value) for key, value in _flat(engine)}
    record["version of pause-megatron"] = f"{pause_megatron.__version__}, sources {code_digest()}"
    record["version of Python"] = ".".join(platform.python_version_tuple()[:2])
    record |= {f"version of {name}": installed_version(name) or "not installed" for name in _PACKAGES}
    return record | environment_record(os.environ)


def corpora_record(corpora: Corpora) -> dict[str, str]:
    """Return name -> digest of the content of a run's corpora, whose paths may differ between ranks.

    Args:
        corpora: The opened corpora.
    """
    valid = [corpus.manifest.fingerprint for corpus in corpora.valid]
    sides = (
        {"content of data.side": _text([side.record.file.digest for side in corpora.sides])} if corpora.sides else {}
    )
    return sides | {
        "content of data.prefix": corpora.fingerprint,
        "names in data.prefix": _text(corpus_names(str(corpus.prefix) for corpus in corpora.corpora)),
        "content of data.valid_prefix": _text(valid),
        "names in data.valid_prefix": _text(corpus_names(str(corpus.prefix) for corpus in corpora.valid)),
        "content of data.tokenizer": corpora.tokenizer.fingerprint,
    }


def environment_record(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that affect numerics or the order in which ranks sum.

    Args:
        environment: Environment variables of this process.
    """
    names = {*_VARIABLES, *(name for name in environment if name.startswith(_PREFIXES))}
    return {f"variable {name}": environment.get(name, "not set") for name in sorted(names)}


def code_digest(package: Path = PACKAGE) -> str:
    """Return a digest of the names and bytes of a package's sources.

    Args:
        package: Folder of the package.
    """
    digest = xxhash.xxh3_128()
    for path in _sources(package):
        try:
            # Reading a pipe or a device may never end.
            content = path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else b"no file"
        except OSError as error:
            content = f"cannot be read: {error.strerror}".encode()
        digest.update(os.fsencode(path.relative_to(package)) + f" {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(package: Path) -> list[Path]:
    """Return the *.py files, and folders that cannot be listed; hidden ones, such as editors' locks, are left out."""
    found: list[Path] = []

    def add_unlistable(error: OSError) -> None:
        found.append(Path(error.filename))

    for folder, folders, files in os.walk(package, onerror=add_unlistable):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found.extend(Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("."))
    return sorted(found)


def _text(value: Any) -> str:
    """Return a value as a message shows it."""
    return repr(list(value) if isinstance(value, tuple) else value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _manifest(path: str) -> str:
    """Return the digest of a checkpoint's manifest, which holds those of its files; it may be gone in a resumed run."""
    try:
        return digest_of(checkpoint_config(path).parent / "manifest.json")
    except ConfigError:
        return "not there"


def _policy(name: str, gaps: Callable[[], Iterator[np.ndarray]], where: str = "") -> dict[str, str]:
    """Return digests of a user's placement policy: its sources, and its gaps, which may depend on data files too."""
    before = set(sys.modules)
    chosen = _gaps_digest(gaps)  # first: a policy may import modules when it is called
    source = _modules_digest(name.partition(":")[0], before)
    return {f"source of {name}": source, f"pauses {where}by {name}": chosen}


def _objective(config: ResolvedConfig) -> dict[str, str]:
    """Return digests of the sources of a user's objective and token weights."""
    named, before = config.objective, set(sys.modules)
    names = [name for name in (named.name, named.token_weights) if name is not None and ":" in name]
    try:
        loss_plan(named)  # imports them
    except Exception as error:  # reported where the model is built
        return {f"source of {name}": f"not usable: {type(error).__name__}" for name in names}
    return {f"source of {name}": _modules_digest(name.partition(":")[0], before) for name in names}


def _gaps_digest(gaps: Callable[[], Iterator[np.ndarray]]) -> str:
    """Return a digest of the gaps that a policy chooses in a few synthetic windows or answers."""
    digest = xxhash.xxh3_128()
    try:
        for each in gaps():
            digest.update(f"{each.size} ".encode() + each.tobytes())
    except Exception as error:  # reported where the windows of the run are built
        return f"no gaps, but {type(error).__name__}"
    return digest.hexdigest()


def _window_gaps(config: ResolvedConfig) -> Iterator[np.ndarray]:
    plan = PausePlan.of(config.pause, config.data.sequence_length)
    injector = PauseInjector(plan, range(1), "", "", _synthetic_texts())
    text = np.arange(plan.text_length, dtype=np.int64) % _TOKENS
    side = None if config.data.side is None else (text * 7 % 11).astype(np.float32)
    for sample in range(_WINDOWS):
        yield injector.gaps(text, sample, side=side, documents=np.arange(0, text.size, 50))


def _answer_gaps(config: ResolvedConfig, placement: str) -> Iterator[np.ndarray]:
    pause, rate = config.pause, config.finetune.answer_rate
    answers = AnswerPauses(placement, rate, pause.run, pause.pattern, _synthetic_texts())
    for number in range(1, 1 + _WINDOWS):
        yield answers.gaps(np.arange(number * _TOKENS // 2, dtype=np.int64) % _TOKENS, 0, "", 0, number=number)


def _synthetic_texts() -> TokenTextTable:
    return TokenTextTable(_TOKENS, lambda ids: "".join(chr(32 + token) for token in ids), [])


def _modules_digest(module: str, before: set[str]) -> str:
    """Return a digest of the files of a module and of what belongs to it."""
    found = modules_of(module, before)
    if found is None:
        return "not found"
    digest = xxhash.xxh3_128()
    for name, file in found.items():
        digest.update(f"{name} {digest_of(file)}\n".encode())
    return digest.hexdigest()
