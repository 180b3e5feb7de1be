"""Whole parameters out of a checkpoint of any tensor-parallel size and ZeRO stage, a few rows at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pause_megatron.checkpoint.layout import VOCABULARY, partition_dim, row_spans
from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.engine import Address
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
    """Master weights as they would be at tensor-parallel size 1 (see `checkpoint.layout`), vocabulary padding included.

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
        entry = self.manifest.parameters.get(self._stored(name))
        if entry is None:
            raise CheckpointError(f"{self.folder}: expected a parameter {name}, the checkpoint has none of that name")
        if entry.partition_dim != partition_dim(name):
            raise CheckpointError(
                f"{self.folder}: expected {name} cut along dimension {partition_dim(name)}, its manifest says "
                f"{entry.partition_dim}"
            )
        ranks = self.manifest.tensor_parallel
        return tuple(n * ranks if dimension == entry.partition_dim else n for dimension, n in enumerate(entry.shape))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Merged rows `[start, stop)`: fp32 [stop - start, ...].

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        shape = self.shape(name)
        if partition_dim(name) == 1:
            ranks = self.manifest.tensor_parallel
            parts = [self._read(name, rank, start, stop, shape[1] // ranks) for rank in range(ranks)]
            return torch.cat(parts, dim=1) if ranks > 1 else parts[0]
        width = shape[1] if len(shape) > 1 else None
        pieces = []
        for span in row_spans(name, shape[0], self.manifest.tensor_parallel):
            low, high = max(start, span.start), min(stop, span.start + span.count)
            if low < high:
                offset = span.local - span.start
                pieces.append(self._read(name, span.rank, low + offset, high + offset, width))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _read(self, name: str, rank: int, start: int, stop: int, width: int | None) -> Tensor:
        each = 1 if width is None else width
        self._mapped += 4 * each * (stop - start)
        if self._mapped > _MAPPED_BYTES:
            self._readers.clear()
            self._mapped = 0
        if rank not in self._readers:
            self._readers[rank] = CheckpointReader(self.folder, rank)
        address = Address(self._stored(name), start * each, (stop - start) * each)
        values = self._readers[rank].read(address, MASTER)
        return values if width is None else values.view(-1, width)

    def _stored(self, name: str) -> str:
        if name not in self.manifest.parameters:
            for pair in _FUSED.items():
                for this, other in (pair, pair[::-1]):
                    if name.endswith(this):
                        return name.removesuffix(this) + other
        return name


def load_weights(model: nn.Module, reader: MergedReader, *, live_rows: int, rank: int, ranks: int) -> None:
    """Copies master weights of any tensor-parallel size into one rank's shard of a model, before DeepSpeed sees it.

    Args:
        model: a PauseGPTModel
        reader: of the checkpoint
        live_rows: vocabulary rows that are text or pauses; padding rows become 0, however many there are
        rank, ranks: the model's place among its tensor-parallel ranks

    Raises:
        CheckpointError: names or shapes differ: the checkpoint is of another model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _check_shape(name, tuple(parameter.shape), reader, live_rows, ranks)
            parameter.copy_(_shard(name, tuple(parameter.shape), reader, live_rows, rank, ranks))
    known = {reader._stored(name) for name, _ in model.named_parameters()}
    if unknown := sorted(reader.manifest.parameters.keys() - known):
        raise CheckpointError(f"{reader.folder}: a checkpoint of another model: this one has no {unknown[0]}")


def _check_shape(name: str, shard: tuple[int, ...], reader: MergedReader, live_rows: int, ranks: int) -> None:
    cut, found = partition_dim(name), reader.shape(name)
    expected = tuple(n * ranks if dimension == cut else n for dimension, n in enumerate(shard))
    fits = found == expected
    if name in VOCABULARY:
        fits = found[0] >= live_rows and found[1:] == expected[1:]
    if not fits:
        raise CheckpointError(
            f"{reader.folder}: a checkpoint of another model: parameter {name} has shape {found} in the checkpoint and "
            f"{expected} in this run"
        )


def _shard(name: str, shape: tuple[int, ...], reader: MergedReader, live_rows: int, rank: int, ranks: int) -> Tensor:
    if name in VOCABULARY:
        first = rank * shape[0]
        stop = min(first + shape[0], live_rows)
        values = torch.zeros(shape)
        if first < stop:
            values[: stop - first] = reader.rows(name, first, stop)
        return values
    if partition_dim(name) == 1:
        return reader.rows(name, 0, shape[0])[:, rank * shape[1] : (rank + 1) * shape[1]]
    if partition_dim(name) is None:
        return reader.rows(name, 0, shape[0])
    spans = [span for span in row_spans(name, shape[0] * ranks, ranks) if span.rank == rank]
    return torch.cat([reader.rows(name, span.start, span.start + span.count) for span in spans])
