"""Tensors of a native checkpoint as the writers of Megatron-LM's formats ask for them: rows, or a rank's shard."""

from __future__ import annotations

import torch
from torch import Tensor

from pause_megatron.checkpoint.format import MASTER
from pause_megatron.checkpoint.layout import VOCABULARY, partition_dim, row_spans, shard_shape
from pause_megatron.hf.checkpoint import NativeCheckpoint
from pause_megatron.hf.weights import native_shapes
from pause_megatron.megatron_lm.dist_writer import StackedTensor
from pause_megatron.megatron_lm.names import place_of


def stacked_tensors(
    checkpoint: NativeCheckpoint, rows: int, key: str = MASTER, prefix: str = ""
) -> list[StackedTensor]:
    """Return the tensors of a torch_dist checkpoint for one kind of values, with all layers stacked.

    Args:
        checkpoint: The checkpoint to export.
        rows: Vocabulary rows, padding included.
        key: One of `ADAM_STATE`.
        prefix: Put before the key of each tensor.
    """
    model = checkpoint.config.model
    tensors: dict[str, StackedTensor] = {}
    for native, shape in native_shapes(model, rows).items():
        place = place_of(native)
        if place.stacked in tensors:
            continue
        tensors[place.stacked] = StackedTensor(
            f"{prefix}{place.stacked}",
            shape,
            None if place.layer is None else model.depth,
            _Rows(checkpoint, native, place.layer is not None, key),
        )
    return list(tensors.values())


class _Rows:
    """Rows of one native parameter in every layer."""

    def __init__(self, checkpoint: NativeCheckpoint, native: str, layered: bool, key: str) -> None:
        self._checkpoint, self._native, self._layered, self._key = checkpoint, native, layered, key
        self._order = checkpoint.config.model.order

    def __call__(self, layer: int, start: int, stop: int) -> Tensor:
        name = self._native
        if self._layered:
            name = name.replace("decoder.layers.0.", f"decoder.layers.{self._order[layer]}.")
        return live_rows(self._checkpoint, name, start, stop, self._key)


def shard_of(checkpoint: NativeCheckpoint, name: str, shape: tuple[int, ...], rank: int, ranks: int) -> Tensor:
    """Return one rank's shard of a merged parameter, fp32.

    Args:
        checkpoint: The checkpoint to export.
        name: Native parameter name.
        shape: Merged shape, with the padding rows of the export.
        rank: Tensor-parallel rank.
        ranks: Tensor-parallel size.
    """
    if partition_dim(name) == 1:
        width = shape[1] // ranks
        return live_rows(checkpoint, name, 0, shape[0])[:, rank * width : (rank + 1) * width].clone()
    shard = torch.empty(shard_shape(name, shape, ranks))
    for span in row_spans(name, shape[0], ranks):
        if partition_dim(name) is None or span.rank == rank:
            shard[span.local : span.local + span.count] = live_rows(
                checkpoint, name, span.start, span.start + span.count
            )
    return shard


def live_rows(checkpoint: NativeCheckpoint, name: str, start: int, stop: int, key: str = MASTER) -> Tensor:
    """Return rows of a merged parameter; padding rows of the vocabulary are 0, however many there are.

    Args:
        checkpoint: The checkpoint to export.
        name: Native parameter name.
        start: First row.
        stop: Row after the last.
        key: One of `ADAM_STATE`.
    """
    reader = checkpoint.reader
    if name not in VOCABULARY:
        return reader.rows(name, start, stop, key)
    values = torch.zeros(stop - start, *reader.shape(name)[1:])
    live = min(stop, checkpoint.vocabulary.size)
    if start < live:
        values[: live - start] = reader.rows(name, start, live, key)
    return values
