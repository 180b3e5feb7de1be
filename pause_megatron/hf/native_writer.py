"""Writing a native checkpoint from Hugging Face tensors: one state file for each tensor-parallel rank, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pause_megatron.checkpoint.format import ADAM_STATE, MANIFEST, MASTER, TensorName, state_file
from pause_megatron.checkpoint.layout import VOCABULARY, partition_dim, row_spans, shard_shape
from pause_megatron.checkpoint.manifest import FileEntry, Manifest, ParameterEntry
from pause_megatron.checkpoint.verify import Report
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.files.durable import write_whole
from pause_megatron.hf.folder import SourceWeights
from pause_megatron.hf.safetensors_file import Entry, SafetensorsWriter
from pause_megatron.hf.weights import HFRows, HFTensor, native_rows, native_shapes
from pause_megatron.model import Vocabulary
from pause_megatron.model.init import pause_row

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class PauseRows:
    """Rows that the source lacks.

    Attributes:
        ids: where; empty where the source has them
        text_rows: rows of the source that are text, whose statistics the new rows are drawn from
        seed: of the draw
    """

    ids: tuple[int, ...]
    text_rows: int
    seed: int


def write_native(
    folder: Path,
    config: ResolvedConfig,
    tensors: Sequence[HFTensor],
    weights: SourceWeights,
    *,
    vocabulary: Vocabulary,
    pauses: PauseRows,
    corpus: str,
    report: Report,
) -> None:
    """Writes the state files and, last, the manifest over everything in the folder.

    Args:
        folder: holds config.yaml and tokenizer/ already
        config: resolved; `parallel.tensor` is the number of state files
        tensors: the source's, with its own number of vocabulary rows
        weights: their values
        vocabulary: of the native model
        pauses: rows to make
        corpus: what the manifest says about the data
        report: told how far it is
    """
    ranks = config.parallel.tensor
    shapes = native_shapes(config.model, vocabulary.padded(config.model.vocab_multiple, ranks))
    source = _Source(native_rows(list(tensors)), weights, shapes, pauses)
    total, done = 4 * ranks * sum(_numel(shard_shape(name, shape, ranks)) for name, shape in shapes.items()), 0
    for rank in range(ranks):
        entries = {}
        for tensor in (TensorName(key, name, 0) for key in ADAM_STATE for name in shapes):
            shape = shard_shape(tensor.parameter, shapes[tensor.parameter], ranks)
            entries[tensor] = Entry(str(tensor), (_numel(shape),), torch.float32)
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


class _Source:
    """Merged rows of native parameters, out of Hugging Face tensors."""

    def __init__(
        self,
        pieces: dict[str, list[HFRows]],
        weights: SourceWeights,
        shapes: dict[str, tuple[int, ...]],
        pauses: PauseRows,
    ) -> None:
        self._pieces, self._weights, self._shapes = pieces, weights, shapes
        self._made = {name: self._pause_rows(name, pauses) for name in VOCABULARY if name in shapes}

    def shard(self, name: str, rank: int, ranks: int) -> Iterator[Tensor]:
        """One rank's shard, fp32, block after block of rows."""
        shape = self._shapes[name]
        cut = partition_dim(name)
        columns = slice(None)
        if cut == 1:
            width = shape[1] // ranks
            columns = slice(rank * width, (rank + 1) * width)
        block = max(_BLOCK_BYTES // (4 * _numel(shape[1:])), 1)
        for span in row_spans(name, shape[0], ranks):
            if cut != 0 or span.rank == rank:
                for start in range(span.start, span.start + span.count, block):
                    values = self._rows(name, start, min(start + block, span.start + span.count))
                    yield values if cut != 1 else values[:, columns]

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        values = torch.zeros(stop - start, *self._shapes[name][1:])  # rows that nobody has are padding
        for piece in self._pieces[name]:
            low, high = max(start, piece.native), min(stop, piece.native + piece.count)
            if low < high:
                offset = piece.start - piece.native
                values[low - start : high - start] = self._weights.rows(piece.name, low + offset, high + offset)
        for row, made in self._made.get(name, {}).items():
            if start <= row < stop:
                values[row - start] = made
        return values

    def _pause_rows(self, name: str, pauses: PauseRows) -> dict[int, Tensor]:
        """Normal with the mean and standard deviation of the text rows, per channel, in two passes over them."""
        if not pauses.ids:
            return {}
        (piece,) = self._pieces[name]
        block = max(_BLOCK_BYTES // (4 * self._shapes[name][1]), 1)

        def blocks() -> Iterator[Tensor]:
            for start in range(0, pauses.text_rows, block):
                stop = min(start + block, pauses.text_rows)
                yield self._weights.rows(piece.name, start, stop).double()

        mean = sum(rows.sum(dim=0) for rows in blocks()) / pauses.text_rows
        spread = (sum((rows - mean).square().sum(dim=0) for rows in blocks()) / pauses.text_rows).sqrt()
        return {
            row: pause_row(pauses.seed, name, index, mean.float(), spread.float())
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
