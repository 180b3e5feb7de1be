"""Restoring a checkpoint into a rank: the weights into a fresh model, then the state into DeepSpeed's engine.

The weights go first. DeepSpeed partitions, casts and copies them in ways that differ by ZeRO stage; built from the
right weights, all of its copies are right. The fp32 masters are overwritten afterwards: under bf16 DeepSpeed would
have made them from the rounded weights.

    shards = load_weights(model, MergedReader(folder), live_rows=..., rank=..., ranks=...)
    ...                                # deepspeed.initialize
    restore_engine(engine, shards)     # to resume; restore_masters where the optimizer starts afresh
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pause_megatron.checkpoint.format import ADAM_STATE, MASTER
from pause_megatron.checkpoint.layout import is_of_one_run
from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.merge import MergedReader, ReshardedReader
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.engine import Address, Engine
from pause_megatron.errors import CheckpointError


class ShardReader(Protocol):
    """One tensor-parallel rank's shards of the parameters and moments in a checkpoint.

    Attributes:
        folder: The checkpoint.
        manifest: Its manifest.
    """

    folder: Path
    manifest: Manifest

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the rank's shard of each parameter, by native name."""
        ...

    def read(self, address: Address, key: str) -> Tensor:
        """Return elements of one flattened shard of one of `ADAM_STATE`, fp32 [address.numel]."""
        ...


def load_weights(
    model: nn.Module, merged: MergedReader, *, live_rows: int, rank: int, ranks: int, own: bool = True
) -> ShardReader:
    """Copy a checkpoint's fp32 master weights into one rank's shard of a model, before DeepSpeed wraps it.

    The rank reads its own shards where the checkpoint's are the model's. Otherwise they are resharded.

    Args:
        model: A fresh model, this rank's shard.
        merged: The checkpoint, of any tensor-parallel size, data-parallel size and ZeRO stage.
        live_rows: Vocabulary rows that are text or pauses. Padding rows become 0 where the state is resharded.
        rank: Tensor-parallel rank.
        ranks: Tensor-parallel size.
        own: Whether auxiliary heads and adapters of the model are restored, as in a resumed run; otherwise they stay as
            they are. Auxiliary heads of a checkpoint are not read where the model has none; `merged` merges adapters.

    Returns:
        The rank's shards, for `restore_engine` or `restore_masters`.

    Raises:
        CheckpointError: A parameter is missing or has another shape: it is a checkpoint of another model.
    """
    shapes, manifest = _shapes(model, own), merged.manifest
    reader: ShardReader
    if manifest.tensor_parallel == ranks and manifest.shard_shapes == shapes:
        reader = CheckpointReader(merged.folder, rank)
    else:
        reader = ReshardedReader(merged, shapes, live_rows=live_rows, rank=rank, ranks=ranks)
    restore_weights(model, reader, own=own)
    return reader


def restore_weights(model: nn.Module, reader: ShardReader, *, own: bool = True) -> None:
    """Copy shards of the fp32 master weights into a model of the same shapes, before DeepSpeed wraps it.

    Args:
        model: A fresh model.
        reader: The rank's shards.
        own: As in `load_weights`.

    Raises:
        CheckpointError: Names or shapes differ: it is a checkpoint of another model.
    """
    expected, shapes = _shapes(model, own), reader.shapes
    if expected != shapes:
        name = min(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
        raise CheckpointError(
            f"{reader.folder}: the checkpoint has a different architecture: {name}: expected shape "
            f"{expected.get(name, 'none')}, got {shapes.get(name, 'none')}"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in expected:
                values = reader.read(Address(name, 0, parameter.numel()), MASTER)
                parameter.copy_(values.view_as(parameter))


def restore_engine(engine: Engine, reader: ShardReader) -> None:
    """Overwrite the fp32 masters, AdamW's moments and its step.

    Args:
        engine: Built from a model that `load_weights` filled.
        reader: The rank's shards.
    """
    for address in engine.state.needed():
        for key in ADAM_STATE:
            engine.state.set(address, key, reader.read(address, key))
    engine.state.step = reader.manifest.optimizer_step


def restore_masters(engine: Engine, reader: ShardReader) -> None:
    """Overwrite only the fp32 masters, without auxiliary heads and adapters; the moments and the step stay as they are.

    Args:
        engine: Built from a model that `load_weights` filled.
        reader: The rank's shards.
    """
    for address in engine.state.needed():
        if not is_of_one_run(address.name):
            engine.state.set(address, MASTER, reader.read(address, MASTER))


def _shapes(model: nn.Module, own: bool) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad and (own or not is_of_one_run(name))
    }
