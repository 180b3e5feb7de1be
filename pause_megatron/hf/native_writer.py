"""Streaming writer of a native checkpoint from tensors of a source: a state file for each tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pause_megatron.checkpoint.format import ADAM_STATE, MANIFEST, MASTER, TensorName, state_file
from pause_megatron.checkpoint.layout import VOCABULARY, partition_dim, row_spans, shard_shape
from pause_megatron.checkpoint.manifest import FileEntry, Manifest, ParameterEntry
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.files.durable import write_whole
from pause_megatron.hf.safetensors_file import SafetensorsWriter, TensorEntry
from pause_megatron.hf.weights import HFRows, native_shapes
from pause_megatron.model import Vocabulary
from pause_megatron.model.init import pause_row
from pause_megatron.terminal.progress import Report

_BLOCK_BYTES = 16 << 20


class RowSource(Protocol):
    """Tensors of a source, read a few rows at a time."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[start, stop)` of a tensor of the source, fp32 [stop - start, ...]."""


@dataclass(frozen=True)
class PauseRows:
    """New pause rows, which the source lacks.

    Attributes:
        ids: Ids of the new rows; empty if the source has them.
        text_rows: Text rows of the source, whose mean and standard deviation the new rows are drawn with.
        seed: Seed of the draw.
    """

    ids: tuple[int, ...]
    text_rows: int
    seed: int


def write_native(
    folder: Path,
    config: ResolvedConfig,
    pieces: Mapping[str, Sequence[HFRows]],
    weights: RowSource,
    *,
    vocabulary: Vocabulary,
    pauses: PauseRows,
    corpus: str,
    report: Report,
) -> None:
    """Write the state files and, last, the manifest of everything in the folder.

    Args:
        folder: The checkpoint, which has config.yaml and tokenizer/ already.
        config: Configuration of the checkpoint; `parallel.tensor` is the number of state files.
        pieces: Rows of the source's tensors that fill each native parameter, with its number of vocabulary rows.
        weights: Values of the tensors.
        vocabulary: Vocabulary of the native model.
        pauses: New pause rows.
        corpus: The manifest's fingerprint of the data.
        report: Progress callback.
    """
    ranks = config.parallel.tensor
    shapes = native_shapes(config.model, vocabulary.padded(config.model.vocab_multiple, ranks))
    source = _MergedRows(pieces, weights, shapes, pauses)
    total, done = 4 * ranks * sum(_numel(shard_shape(name, shape, ranks)) for name, shape in shapes.items()), 0
    for rank in range(ranks):
        entries = {}
        for tensor in (TensorName(key, name, 0) for key in ADAM_STATE for name in shapes):
            shape = shard_shape(tensor.parameter, shapes[tensor.parameter], ranks)
            entries[tensor] = TensorEntry(str(tensor), (_numel(shape),), torch.float32)
        path = folder / state_file(rank, ranks, 0, 1)
        with SafetensorsWriter(path, list(entries.values())) as writer:
            for tensor, entry in entries.items():
                if tensor.key != MASTER:
                    writer.zeros(entry.shape[0])
                    continue
                for block in source.shard(tensor.parameter, rank, ranks):
                    writer.write(block)
                done += entry.bytes
                report("writing weights", done, total)
    _write_manifest(folder, config, shapes, corpus)


class _MergedRows:
    """Rows of merged native parameters, from tensors of a source."""

    def __init__(
        self,
        pieces: Mapping[str, Sequence[HFRows]],
        weights: RowSource,
        shapes: dict[str, tuple[int, ...]],
        pauses: PauseRows,
    ) -> None:
        self._pieces, self._weights, self._shapes = pieces, weights, shapes
        self._new_rows = {name: self._pause_rows(name, pauses) for name in VOCABULARY if name in shapes}

    def shard(self, name: str, rank: int, ranks: int) -> Iterator[Tensor]:
        """Yield one rank's shard in blocks of rows, fp32."""
        shape = self._shapes[name]
        dim = partition_dim(name)
        columns = slice(None)
        if dim == 1:
            width = shape[1] // ranks
            columns = slice(rank * width, (rank + 1) * width)
        block = max(_BLOCK_BYTES // (4 * _numel(shape[1:])), 1)
        for span in row_spans(name, shape[0], ranks):
            if dim != 0 or span.rank == rank:
                for start in range(span.start, span.start + span.count, block):
                    values = self._rows(name, start, min(start + block, span.start + span.count))
                    yield values if dim != 1 else values[:, columns]

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        values = torch.zeros(stop - start, *self._shapes[name][1:])  # other rows are padding
        for piece in self._pieces[name]:
            low, high = max(start, piece.native), min(stop, piece.native + piece.count)
            if low < high:
                offset = piece.start - piece.native
                values[low - start : high - start] = self._weights.rows(piece.name, low + offset, high + offset)
        for row, new in self._new_rows.get(name, {}).items():
            if start <= row < stop:
                values[row - start] = new
        return values

    def _pause_rows(self, name: str, pauses: PauseRows) -> dict[int, Tensor]:
        """Draw pause rows with the mean and standard deviation of the text rows, per channel, in two passes."""
        if not pauses.ids:
            return {}
        (piece,) = self._pieces[name]
        block = max(_BLOCK_BYTES // (4 * self._shapes[name][1]), 1)

        def blocks() -> Iterator[Tensor]:
            for start in range(0, pauses.text_rows, block):
                stop = min(start + block, pauses.text_rows)
                yield self._weights.rows(piece.name, start, stop).double()

        zero = torch.zeros(self._shapes[name][1:], dtype=torch.float64)
        mean = sum((rows.sum(dim=0) for rows in blocks()), zero) / pauses.text_rows
        variance = sum(((rows - mean).square().sum(dim=0) for rows in blocks()), zero) / pauses.text_rows
        return {
            row: pause_row(pauses.seed, name, index, mean.float(), variance.sqrt().float())
            for index, row in enumerate(pauses.ids)
        }


def _write_manifest(folder: Path, config: ResolvedConfig, shapes: dict[str, tuple[int, ...]], corpus: str) -> None:
    ranks = config.parallel.tensor
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): FileEntry.of(path) for path in paths}
    parameters = {
        name: ParameterEntry(shard_shape(name, shape, ranks), partition_dim(name)) for name, shape in shapes.items()
    }
    manifest = Manifest(
        step=0,
        optimizer_step=0,
        tensor_parallel=ranks,
        data_parallel=1,
        zero_stage=config.engine.zero_stage or 0,
        corpus=corpus,
        parameters=parameters,
        files=files,
        progress={"step": 0, "tokens": 0, "text_tokens": 0},
    )
    write_whole(folder / MANIFEST, manifest.dumps().encode())


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
