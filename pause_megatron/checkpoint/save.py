"""Saving: hidden folder, every rank's file, agreement, manifest, name, pointer - in that order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save_file

from pause_megatron.checkpoint.manifest import MANIFEST, FileEntry, Manifest, ParameterEntry
from pause_megatron.checkpoint.store import Store
from pause_megatron.distributed.collective import barrier, gather_objects
from pause_megatron.distributed.context import ParallelContext
from pause_megatron.durable import digest_of, sync_file, write_whole
from pause_megatron.engine import ADAM_STATE, Engine
from pause_megatron.errors import CheckpointError


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
    """Writes a checkpoint. Every rank calls this; it returns when the checkpoint is complete and `latest` points at it.

    Killed at any moment, it leaves the older checkpoints as they were and the new one either complete or without a
    name. Every file is synced and its digest taken before the manifest is written.

    Args:
        step: steps that the run has taken
        corpus: fingerprint of the corpus, so that another one is refused when the run resumes
        progress: counters of the run
        config_yaml: the resolved configuration
        save_tokenizer: writes the tokenizer's files into the folder it is given
        keep: newest checkpoints that stay
        extra: further files by name; those of rank 0 are written

    Raises:
        CheckpointError: a rank could not write (a full disk, say). Nothing is left of the new checkpoint.
    """
    hidden = store.hidden(step)
    begun = _attempt(lambda: store.begin(step)) if context.rank == 0 else None
    _give_up_on_failure(hidden, step, gather_objects(begun), context.rank)
    mine = _attempt(lambda: _write_mine(hidden, engine, context, config_yaml, save_tokenizer, extra))
    outcomes = gather_objects(mine)
    _give_up_on_failure(hidden, step, outcomes, context.rank)
    written = {name: entry for outcome in outcomes for name, entry in outcome.items()}
    failure: str | None = None
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
        failure = _attempt(lambda: _publish(store, hidden, manifest, keep))
    _give_up_on_failure(hidden, step, gather_objects(failure), context.rank)
    barrier()
    return store.path(step)


def _write_mine(
    hidden: Path,
    engine: Engine,
    context: ParallelContext,
    config_yaml: str,
    save_tokenizer: Callable[[Path], Any],
    extra: Mapping[str, bytes],
) -> dict[str, FileEntry]:
    state = engine.state
    tensors = {
        f"{key}|{address.name}|{address.start}": state.get(address, key).contiguous()
        for address in state.owned()
        for key in ADAM_STATE
    }
    name = (
        f"state-tp{context.tp_rank:02d}-of-{context.tp_size:02d}"
        f"-dp{context.dp_rank:04d}-of-{context.dp_size:04d}.safetensors"
    )
    save_file(tensors, hidden / name)
    paths = [hidden / name]
    if context.rank == 0:
        write_whole(hidden / "config.yaml", config_yaml.encode())
        save_tokenizer(hidden / "tokenizer")
        for name, content in extra.items():
            write_whole(hidden / name, content)
        paths += [hidden / name for name in ("config.yaml", *extra)]
        paths += [*sorted(p for p in (hidden / "tokenizer").rglob("*") if p.is_file())]
    entries = {}
    for path in paths:
        sync_file(path)
        entries[path.relative_to(hidden).as_posix()] = FileEntry(path.stat().st_size, digest_of(path))
    return entries


def _publish(store: Store, hidden: Path, manifest: Manifest, keep: int) -> None:
    write_whole(hidden / MANIFEST, manifest.dumps().encode())
    store.publish(hidden, manifest.step)
    store.prune(keep)


def _parameters(engine: Engine) -> dict[str, ParameterEntry]:
    entries = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter's own shape is empty between steps; ds_shape is what it was.
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            cut = getattr(parameter, "tensor_model_parallel", False)
            entries[name] = ParameterEntry(shape, parameter.partition_dim if cut else None)
    return entries


def _attempt(action: Callable[[], Any]) -> Any:
    """The action's result, or its failure as text: a rank that raised alone would leave the others waiting."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _give_up_on_failure(hidden: Path, step: int, outcomes: list[Any], rank: int) -> None:
    failures = [f"rank {index}: {outcome}" for index, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    if not failures:
        return
    if rank == 0:
        shutil.rmtree(hidden, ignore_errors=True)
    raise CheckpointError(
        f"{hidden.parent}: the checkpoint of step {step} could not be written; earlier ones are untouched.\n  "
        + "\n  ".join(failures)
    )
