"""Whole parameters and moments out of a checkpoint of any tensor-parallel size and ZeRO stage, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pause_megatron.checkpoint.layout import VOCABULARY, partition_dim, row_spans
from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.engine import Address, Engine
from pause_megatron.engine.state import MASTER
from pause_megatron.errors import CheckpointError

# State files are read through memory maps, whose pages stay until the file is closed.
_MAPPED_BYTES = 128 << 20

# Transformer Engine keeps a norm's weight in the linear layer that follows it.
_FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


class MergedReader:
    """Parameters and moments as they would be at tensor-parallel size 1 (see `checkpoint.layout`), padding included.

    Reads what is asked for; memory is bounded by that and 128 MB of file pages.

    Args:
        folder: a checkpoint
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self._readers: dict[int, CheckpointReader] = {}
        self._mapped = 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged parameter.

        Raises:
            CheckpointError: there is no such parameter.
        """
        entry = self.manifest.parameters.get(self.stored_name(name))
        if entry is None:
            raise CheckpointError(f"{self.folder}: expected a parameter {name}, the checkpoint has none of that name")
        if entry.partition_dim != partition_dim(name):
            raise CheckpointError(
                f"{self.folder}: expected {name} cut along dimension {partition_dim(name)}, its manifest says "
                f"{entry.partition_dim}"
            )
        ranks = self.manifest.tensor_parallel
        return tuple(n * ranks if dimension == entry.partition_dim else n for dimension, n in enumerate(entry.shape))

    def rows(self, name: str, start: int, stop: int, key: str = MASTER) -> Tensor:
        """Merged rows `[start, stop)` of one of `ADAM_STATE`: fp32 [stop - start, ...].

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        shape = self.shape(name)
        if partition_dim(name) == 1:
            ranks = self.manifest.tensor_parallel
            parts = [self._read(name, rank, start, stop, shape[1] // ranks, key) for rank in range(ranks)]
            return torch.cat(parts, dim=1) if ranks > 1 else parts[0]
        width = shape[1] if len(shape) > 1 else None
        pieces = []
        for span in row_spans(name, shape[0], self.manifest.tensor_parallel):
            low, high = max(start, span.start), min(stop, span.start + span.count)
            if low < high:
                offset = span.local - span.start
                pieces.append(self._read(name, span.rank, low + offset, high + offset, width, key))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _read(self, name: str, rank: int, start: int, stop: int, width: int | None, key: str) -> Tensor:
        each = 1 if width is None else width
        self._mapped += 4 * each * (stop - start)
        if self._mapped > _MAPPED_BYTES:
            self._readers.clear()
            self._mapped = 0
        if rank not in self._readers:
            self._readers[rank] = CheckpointReader(self.folder, rank)
        address = Address(self.stored_name(name), start * each, (stop - start) * each)
        values = self._readers[rank].read(address, key)
        return values if width is None else values.view(-1, width)

    def stored_name(self, name: str) -> str:
        """Name under which the checkpoint has a parameter: Transformer Engine's for a fused norm."""
        if name not in self.manifest.parameters:
            for pair in _FUSED.items():
                for this, other in (pair, pair[::-1]):
                    if name.endswith(this):
                        return name.removesuffix(this) + other
        return name


class ShardReader:
    """One tensor-parallel rank's share of a model, out of a checkpoint of any tensor-parallel size.

    Args:
        reader: of the checkpoint
        shapes: of the rank's parameters
        live_rows: vocabulary rows that are text or pauses; padding rows are 0, however many there are
        rank, ranks: the model's place among its tensor-parallel ranks

    Raises:
        CheckpointError: names or shapes differ: the checkpoint is of another model.
    """

    def __init__(
        self, reader: MergedReader, shapes: Mapping[str, tuple[int, ...]], *, live_rows: int, rank: int, ranks: int
    ) -> None:
        self.manifest = reader.manifest
        self._reader, self._shapes, self._live_rows = reader, dict(shapes), live_rows
        self._rank, self._ranks = rank, ranks
        for name in self._shapes:
            self._check(name)
        known = {reader.stored_name(name) for name in self._shapes}
        if unknown := sorted(reader.manifest.parameters.keys() - known):
            raise CheckpointError(f"{reader.folder}: a checkpoint of another model: this one has no {unknown[0]}")

    def shard(self, name: str) -> Tensor:
        """The rank's shard of a parameter, fp32."""
        return self._rows(name, 0, self._shapes[name][0], MASTER)

    def read(self, address: Address, key: str) -> Tensor:
        """Elements of the flattened shard of one of `ADAM_STATE`, fp32 [address.numel]; no more rows than hold them."""
        width = math.prod(self._shapes[address.name][1:])
        low, stop = address.start // width, address.start + address.numel
        values = self._rows(address.name, low, -(-stop // width), key).flatten()
        return values[address.start - low * width : stop - low * width]

    def _rows(self, name: str, low: int, high: int, key: str) -> Tensor:
        """Rows `[low, high)` of the rank's shard."""
        shape, reader, rank = self._shapes[name], self._reader, self._rank
        if name in VOCABULARY:
            start = rank * shape[0] + low
            stop = min(rank * shape[0] + high, self._live_rows)
            values = torch.zeros(high - low, *shape[1:])
            if start < stop:
                values[: stop - start] = reader.rows(name, start, stop, key)
            return values
        if partition_dim(name) == 1:
            return reader.rows(name, low, high, key)[:, rank * shape[1] : (rank + 1) * shape[1]]
        if partition_dim(name) is None:
            return reader.rows(name, low, high, key)
        pieces = []
        for span in row_spans(name, shape[0] * self._ranks, self._ranks):
            first, last = max(low, span.local), min(high, span.local + span.count)
            if span.rank == rank and first < last:
                offset = span.start - span.local
                pieces.append(reader.rows(name, first + offset, last + offset, key))
        return torch.cat(pieces)

    def _check(self, name: str) -> None:
        cut, found = partition_dim(name), self._reader.shape(name)
        expected = tuple(n * self._ranks if dimension == cut else n for dimension, n in enumerate(self._shapes[name]))
        fits = found == expected
        if name in VOCABULARY:
            fits = found[0] >= self._live_rows and found[1:] == expected[1:]
        if not fits:
            raise CheckpointError(
                f"{self._reader.folder}: a checkpoint of another model: parameter {name} has shape {found} in the "
                f"checkpoint and {expected} in this run"
            )


def load_weights(model: nn.Module, reader: MergedReader, *, live_rows: int, rank: int, ranks: int) -> ShardReader:
    """Copies master weights into one rank's shard of a model, before DeepSpeed sees it. Arguments as `ShardReader`.

    Returns:
        What was read from, for the fp32 masters of the engine: under bf16 DeepSpeed makes them of rounded weights.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shards = ShardReader(reader, shapes, live_rows=live_rows, rank=rank, ranks=ranks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shards.shard(name))
    return shards


def restore_masters(engine: Engine, shards: ShardReader) -> None:
    """Overwrites the engine's fp32 masters; its moments and step stay as they are."""
    for address in engine.state.needed():
        engine.state.set(address, MASTER, shards.read(address, MASTER))
