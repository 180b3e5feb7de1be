"""Saving a checkpoint: hidden folder, every rank's state file, agreement, manifest, rename, `latest`, in this order."""

from __future__ import annotations

import logging
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from pause_megatron.checkpoint.format import ADAM_STATE, CONFIG, MANIFEST, TOKENIZER, TensorName, state_file
from pause_megatron.checkpoint.manifest import FileEntry, Manifest, ParameterEntry
from pause_megatron.checkpoint.reader import state_fault
from pause_megatron.checkpoint.store import Store
from pause_megatron.distributed.collective import barrier, gather_objects
from pause_megatron.distributed.context import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import write_whole
from pause_megatron.run_folder import LATEST
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

T = TypeVar("T")


def save(
    store: Store,
    engine: Engine,
    context: ParallelContext,
    *,
    step: int,
    corpus: str,
    progress: Mapping[str, int],
    config_yaml: str,
    save_tokenizer: Callable[[Path], Any],
    keep: int,
    extra: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Save a checkpoint. Every rank calls this; it returns when the checkpoint is complete and `latest` names it.

    Killed at any moment, it leaves the older checkpoints as they were, and the new one either complete or without its
    name. Every file is synced and its digest taken before the manifest is written.

    Args:
        store: The run's checkpoints.
        engine: The engine whose state is saved.
        context: Process groups of this rank.
        step: Training step after which it is saved.
        corpus: Fingerprint of the corpus. A run on another corpus does not resume from the checkpoint.
        progress: Counters of the run.
        config_yaml: The resolved configuration.
        save_tokenizer: Writes the tokenizer's files into the folder that it is called with.
        keep: Number of newest checkpoints that are kept.
        extra: Content of further files, by name; those of rank 0 are written.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: A rank could not write (a full disk, say). Nothing is left of the new checkpoint.
    """
    hidden = store.hidden(step)
    failure = _attempt(lambda: store.begin(step))[1] if context.rank == 0 else None
    _raise_on_failure(hidden, step, gather_objects(failure), context.rank)
    outcome = _attempt(lambda: _write_own_files(hidden, engine, context, config_yaml, save_tokenizer, extra))
    outcomes = gather_objects(outcome)
    _raise_on_failure(hidden, step, [error for _, error in outcomes], context.rank)
    written = {name: entry for files, _ in outcomes for name, entry in (files or {}).items()}
    if context.rank == 0:
        manifest = Manifest(
            step=step,
            optimizer_step=engine.state.step,
            tensor_parallel=context.tp_size,
            data_parallel=context.dp_size,
            zero_stage=engine.deepspeed.zero_optimization_stage(),
            corpus=corpus,
            parameters=_parameters(engine),
            files=written,
            progress=dict(progress),
        )
        failure = _attempt(lambda: _publish(store, hidden, manifest))[1]
    _raise_on_failure(hidden, step, gather_objects(failure), context.rank)
    _tidy(store, step, keep, context.rank)
    barrier()
    return store.path(step)


def _write_own_files(
    hidden: Path,
    engine: Engine,
    context: ParallelContext,
    config_yaml: str,
    save_tokenizer: Callable[[Path], Any],
    extra: Mapping[str, bytes],
) -> dict[str, FileEntry]:
    state = engine.state
    tensors = {
        TensorName(key, address.name, address.start): state.get(address, key).contiguous()
        for address in state.owned()
        for key in ADAM_STATE
    }
    for tensor_name, values in tensors.items():
        if fault := state_fault(tensor_name.key, values):
            raise CheckpointError(f"{tensor_name}: {fault}; the run has diverged, so its state is not saved")
    name = state_file(context.tp_rank, context.tp_size, context.dp_rank, context.dp_size)
    _save_tensors({str(label): values for label, values in tensors.items()}, hidden / name)
    paths = [hidden / name]
    if context.rank == 0:
        write_whole(hidden / CONFIG, config_yaml.encode())
        save_tokenizer(hidden / TOKENIZER)
        for name, content in extra.items():
            write_whole(hidden / name, content)
        paths += [hidden / name for name in (CONFIG, *extra)]
        paths += [*sorted(p for p in (hidden / TOKENIZER).rglob("*") if p.is_file())]
    return {path.relative_to(hidden).as_posix(): FileEntry.of(path) for path in paths}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the umask's permissions; the library makes it readable only to its owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(stat.S_IMODE(mode))


def _publish(store: Store, hidden: Path, manifest: Manifest) -> None:
    write_whole(hidden / MANIFEST, manifest.dumps().encode())
    store.publish(hidden, manifest.step)


def _tidy(store: Store, step: int, keep: int, rank: int) -> None:
    """Move `latest` and delete old checkpoints. The new one is complete, so a failure here is a warning."""
    if rank == 0:
        try:
            store.move_latest(step)
        except OSError as error:
            _warn(step, f"{store.folder / LATEST} could not be moved to it: {error}")
    try:
        store.prune(step, keep)
    except (OSError, CheckpointError) as error:
        _warn(step, f"older ones could not be deleted: {error}")


def _warn(step: int, what: str) -> None:
    log.warning(f"the checkpoint of step {step} is complete, but {what}", extra=EVERY_RANK)


def _parameters(engine: Engine) -> dict[str, ParameterEntry]:
    entries = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter's own shape is empty between steps; ds_shape is the whole shape.
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            sharded = getattr(parameter, "tensor_model_parallel", False)
            entries[name] = ParameterEntry(shape, getattr(parameter, "partition_dim") if sharded else None)  # noqa: B009
    return entries


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the action's result, or its error as text: a rank that raised alone would leave the others waiting."""
    try:
        return action(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _raise_on_failure(hidden: Path, step: int, errors: list[str | None], rank: int) -> None:
    failures = [f"rank {index}: {error}" for index, error in enumerate(errors) if error is not None]
    if not failures:
        return
    if rank == 0:
        shutil.rmtree(hidden, ignore_errors=True)
    raise CheckpointError(
        f"{hidden.parent}: the checkpoint of step {step} could not be written; earlier ones are untouched.\n  "
        + "\n  ".join(failures)
    )
