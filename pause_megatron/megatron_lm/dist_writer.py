"""Streaming writer of a torch_dist checkpoint on one process, with torch's own file writer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from pause_megatron.megatron_lm.safe import PROPERTIES

_BLOCK_BYTES = 64 << 20
COMMON, CONFIG = "common.pt", "metadata.json"


@dataclass(frozen=True)
class StackedTensor:
    """A tensor of the checkpoint.

    Attributes:
        key: Its key.
        shape: Its shape; of one layer, if `layers` is given.
        layers: Number of layers that it stacks in front; None for a tensor outside of layers.
        rows: Function (layer, first row, row after the last) that returns fp32 rows.
    """

    key: str
    shape: tuple[int, ...]
    layers: int | None
    rows: Callable[[int, int, int], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the data in fp32."""
        return 4 * torch.Size(self.shape).numel() * (self.layers or 1)


def write_torch_dist(
    folder: Path,
    tensors: Sequence[StackedTensor],
    objects: dict[str, Any],
    common: dict[str, Any],
    report: Callable[[int, int], None],
) -> None:
    """Write all files of a folder `iter_XXXXXXX`.

    Args:
        folder: The folder, which does not exist.
        tensors: The tensors, fp32.
        objects: Values of sharded objects, by their unique key.
        common: Content of common.pt.
        report: Progress callback: (bytes done, bytes in all).
    """
    writer = FileSystemWriter(folder, sync_files=True, thread_count=1)
    writer.set_up_storage_writer(True)
    blocks = {(tensor.key, block.offsets): (tensor, block) for tensor in tensors for block in _blocks(tensor)}
    # A plan and thus a file for each key, as if each were written by a rank of its own: within a plan torch keeps the
    # last block of every key in memory.
    by_key: dict[str, list[WriteItem]] = {}
    for tensor, block in blocks.values():
        by_key.setdefault(tensor.key, []).append(_tensor_item(tensor, block))
    plans = [SavePlan(items) for items in by_key.values()]
    if objects:
        plans.append(SavePlan([WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in objects]))
    folder.mkdir()
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    planner = _Planner(blocks, objects, lambda done: report(done, sum(tensor.bytes for tensor in tensors)))
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
    torch.save(common, folder / COMMON)
    record = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    record |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / CONFIG).write_text(json.dumps(record), encoding="utf-8")


@dataclass(frozen=True)
class _Block:
    """Rows `[start, stop)` of one layer."""

    layer: int
    start: int
    stop: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def _blocks(tensor: StackedTensor) -> Iterator[_Block]:
    """Yield blocks of equal numbers of rows."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    step = max(_BLOCK_BYTES // (4 * max(torch.Size(rest).numel(), 1)), 1)
    for layer in range(tensor.layers or 1):
        front = () if tensor.layers is None else (layer,)
        one = () if tensor.layers is None else (1,)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield _Block(layer, start, stop, (*front, start, *(0 for _ in rest)), (*one, stop - start, *rest))


def _tensor_item(tensor: StackedTensor, block: _Block) -> WriteItem:
    size = tensor.shape if tensor.layers is None else (tensor.layers, *tensor.shape)
    chunk = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
    data = TensorWriteData(chunk, _Properties(dtype=torch.float32), torch.Size(size))
    return WriteItem(index=MetadataIndex(tensor.key, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


class _Properties(TensorProperties):
    """Properties of a tensor, pickled so that releases of torch before 2.15, which know no strides, read them too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorProperties, (), self.__getstate__()[:PROPERTIES]


class _Planner(DefaultSavePlanner):
    """Reads each block when the writer asks for it."""

    def __init__(
        self,
        blocks: dict[tuple[str, tuple[int, ...]], tuple[StackedTensor, _Block]],
        objects: dict[str, Any],
        report: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._blocks, self._objects, self._report, self._done = blocks, objects, report, 0

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return what an item of the plan consists of."""
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], buffer)  # megatron-core saves a list of one
            return buffer
        tensor, block = self._blocks[write_item.index.fqn, tuple(write_item.index.offset or ())]
        values = tensor.rows(block.layer, block.start, block.stop).reshape(block.sizes)
        self._done += 4 * values.numel()
        self._report(self._done)
        return values.contiguous()
