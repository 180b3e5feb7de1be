"""Merging and resharding: parameters and moments of a checkpoint at tensor-parallel size 1, or at another size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pause_megatron.checkpoint.format import MASTER
from pause_megatron.checkpoint.layout import VOCABULARY, is_adapter, is_auxiliary, partition_dim, row_spans
from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.config.lora import LORA_A, LORA_B
from pause_megatron.engine import Address
from pause_megatron.errors import CheckpointError

# State files are memory maps: the pages that were read stay resident until the file is closed.
_MAPPED_BYTES = 128 << 20
_MERGED_ROWS = 512
_WEIGHT = ".weight"

# Transformer Engine keeps a norm's weight in the linear layer that follows it.
_FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


class MergedReader:
    """Parameters and moments as at tensor-parallel size 1 (see `checkpoint.layout`), padding rows included.

    Reads what is asked for; memory is bounded by that and 128 MB of file pages.

    Args:
        folder: A checkpoint.
        adapter_scale: Where given, LoRA adapters are merged: a weight W with an adapter is W + adapter_scale B A. The
            product is rounded once, to fp32. None: weights as they are stored.
    """

    def __init__(self, folder: Path, *, adapter_scale: float | None = None) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self.adapter_scale = adapter_scale
        self._readers: dict[int, CheckpointReader] = {}
        self._mapped = 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a merged parameter.

        Args:
            name: Native parameter name.

        Raises:
            CheckpointError: There is no such parameter.
        """
        entry = self.manifest.parameters.get(self.stored_name(name))
        if entry is None:
            raise CheckpointError(f"{self.folder}: expected a parameter {name}, got none of that name")
        if entry.partition_dim != partition_dim(name):
            raise CheckpointError(
                f"{self.folder}: {name}: expected partition_dim {partition_dim(name)}, got {entry.partition_dim}"
            )
        ranks = self.manifest.tensor_parallel
        return tuple(n * ranks if dimension == entry.partition_dim else n for dimension, n in enumerate(entry.shape))

    def rows(self, name: str, start: int, stop: int, key: str = MASTER) -> Tensor:
        """Return merged rows `[start, stop)` of a parameter, fp32 [stop - start, ...].

        Args:
            name: Native parameter name.
            start: First row.
            stop: Row after the last.
            key: One of `ADAM_STATE`.

        Raises:
            CheckpointError: The checkpoint does not hold them.
        """
        values = self._stored_rows(name, start, stop, key)
        if key == MASTER and self.adapter_scale is not None and name.endswith(_WEIGHT):
            base = name.removesuffix(_WEIGHT)
            low, high = f"{base}.{LORA_A}", f"{base}.{LORA_B}"
            if low in self.manifest.parameters:
                rank = self.shape(low)[0]
                low_rows, high_rows = self._stored_rows(low, 0, rank, key), self._stored_rows(high, start, stop, key)
                return _merged(values, low_rows, high_rows, self.adapter_scale)
        return values

    def _stored_rows(self, name: str, start: int, stop: int, key: str) -> Tensor:
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
        """Return the name of a parameter in the checkpoint: Transformer Engine has another one for a fused norm."""
        if name not in self.manifest.parameters:
            for pair in _FUSED.items():
                for this, other in (pair, pair[::-1]):
                    if name.endswith(this):
                        return name.removesuffix(this) + other
        return name


def _merged(weight: Tensor, low: Tensor, high: Tensor, scale: float) -> Tensor:
    """Return weight + scale high @ low. In fp64, so that rows do not depend on how many are computed together."""
    low64 = low.double().mul_(scale)
    blocks = zip(weight.split(_MERGED_ROWS), high.split(_MERGED_ROWS), strict=True)
    return torch.cat([(rows.double() + right.double() @ low64).float() for rows, right in blocks])


class ReshardedReader:
    """One tensor-parallel rank's shards, out of a checkpoint of any tensor-parallel size.

    Args:
        merged: The checkpoint.
        shapes: Shape of the rank's shard of each parameter, by native name.
        live_rows: Vocabulary rows that are text or pauses; padding rows are 0, however many there are.
        rank: Tensor-parallel rank.
        ranks: Tensor-parallel size.

    Raises:
        CheckpointError: Names or shapes differ: it is a checkpoint of another model.
    """

    def __init__(
        self, merged: MergedReader, shapes: Mapping[str, tuple[int, ...]], *, live_rows: int, rank: int, ranks: int
    ) -> None:
        self.folder, self.manifest = merged.folder, merged.manifest
        self._merged, self._shapes, self._live_rows = merged, dict(shapes), live_rows
        self._rank, self._ranks = rank, ranks
        for name in self._shapes:
            self._check(name)
        known = {merged.stored_name(name) for name in self._shapes}
        merges = merged.adapter_scale is not None
        known |= {name for name in merged.manifest.parameters if is_auxiliary(name) or (merges and is_adapter(name))}
        unknown = sorted(merged.manifest.parameters.keys() - known)
        if unknown:
            raise CheckpointError(
                f"{merged.folder}: the checkpoint has a different architecture: unexpected parameter {unknown[0]}"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the rank's shard of each parameter, by native name."""
        return self._shapes

    def read(self, address: Address, key: str) -> Tensor:
        """Return elements of one flattened shard, fp32 [address.numel]. Only rows that hold them are read.

        Args:
            address: Parameter and its elements.
            key: One of `ADAM_STATE`.
        """
        width = math.prod(self._shapes[address.name][1:])
        low, stop = address.start // width, address.start + address.numel
        values = self._rows(address.name, low, -(-stop // width), key).flatten()
        return values[address.start - low * width : stop - low * width]

    def _rows(self, name: str, low: int, high: int, key: str) -> Tensor:
        """Return rows `[low, high)` of the rank's shard."""
        shape, merged, rank = self._shapes[name], self._merged, self._rank
        if name in VOCABULARY:
            start = rank * shape[0] + low
            stop = min(rank * shape[0] + high, self._live_rows)
            values = torch.zeros(high - low, *shape[1:])
            if start < stop:
                values[: stop - start] = merged.rows(name, start, stop, key)
            return values
        if partition_dim(name) == 1:
            return merged.rows(name, low, high, key)[:, rank * shape[1] : (rank + 1) * shape[1]]
        if partition_dim(name) is None:
            return merged.rows(name, low, high, key)
        pieces = []
        for span in row_spans(name, shape[0] * self._ranks, self._ranks):
            first, last = max(low, span.local), min(high, span.local + span.count)
            if span.rank == rank and first < last:
                offset = span.start - span.local
                pieces.append(merged.rows(name, first + offset, last + offset, key))
        return torch.cat(pieces)

    def _check(self, name: str) -> None:
        cut, shape = partition_dim(name), self._merged.shape(name)
        expected = tuple(n * self._ranks if dimension == cut else n for dimension, n in enumerate(self._shapes[name]))
        fits = shape == expected
        if name in VOCABULARY:
            fits = shape[0] >= self._live_rows and shape[1:] == expected[1:]
        if not fits:
            raise CheckpointError(
                f"{self.folder}: the checkpoint has a different architecture: {name}: expected shape {expected}, "
                f"got {shape}"
            )
