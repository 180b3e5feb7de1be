"""Reader of a torch_dist checkpoint on one process: a few rows of a native parameter at a time."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from pause_megatron.errors import CheckpointError
from pause_megatron.megatron_lm.names import GATED, place_of
from pause_megatron.megatron_lm.safe import read_index, read_object, read_pt

_COMMON = "common_state/shard_0_1"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchDistWeights:
    """Tensors of a torch_dist checkpoint, by native name.

    Memory is that of the largest tensor of one layer, in the checkpoint's type.

    Args:
        folder: `iter_XXXXXXX`.
        shapes: Merged shape of every native parameter, with the vocabulary rows of the checkpoint.

    Raises:
        CheckpointError: A tensor or a part of one is missing, of another shape or type, or of another architecture.
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self._folder = folder
        index = read_index(folder / ".metadata")
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._stored = index.storage_data
        self._held: tuple[str, list[tuple[int, int, Tensor]]] = ("", [])  # one parameter: parts by their first rows
        self._parts: dict[str, list[_Part]] = {}
        self._shapes = shapes
        used: set[str] = set()
        for name, shape in shapes.items():
            self._parts[name] = self._find(name, shape, used)
        unknown = sorted(key for key in self._tensors.keys() - used if not _is_state(key))
        if unknown:
            raise CheckpointError(
                f"{folder}: expected tensors of the model that its arguments describe, got a tensor {unknown[0]!r} "
                f"(and {len(unknown) - 1} more)"
            )

    @staticmethod
    def vocabulary_rows(folder: Path) -> int:
        """Return the rows of the embedding, padding included.

        Args:
            folder: `iter_XXXXXXX`.

        Raises:
            CheckpointError: The checkpoint has no embedding.
        """
        entry = read_index(folder / ".metadata").state_dict_metadata.get("embedding.word_embeddings.weight")
        if not isinstance(entry, TensorStorageMetadata) or len(entry.size) != 2:
            raise CheckpointError(f"{folder}: expected a tensor embedding.word_embeddings.weight, got none")
        return int(entry.size[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[start, stop)` of a native parameter, fp32 [stop - start, ...].

        Args:
            name: Native parameter name.
            start: First row.
            stop: Row after the last.

        Raises:
            CheckpointError: A file is damaged.
        """
        if self._held[0] != name:
            self._held = ("", [])  # freed before the next one is read
            self._held = (name, [(part.row, part.column, self._read(name, part)) for part in self._parts[name]])
        values = torch.empty(stop - start, *self._shapes[name][1:])
        for row, column, tensor in self._held[1]:
            low, high = max(start, row), min(stop, row + tensor.shape[0])
            if low < high:
                target = values[low - start : high - start]
                if tensor.dim() > 1:
                    target = target[:, column : column + tensor.shape[1]]
                target.copy_(tensor[low - row : high - row])
        return values

    def _find(self, name: str, shape: tuple[int, ...], used: set[str]) -> list[_Part]:
        """Return the stored parts of a native parameter, which cover it."""
        place = place_of(name)
        pieces: list[tuple[str, int | None, int, tuple[int, ...]]]  # key, layer, first row, shape
        if place.layer is not None and place.stacked in self._tensors:
            pieces = [(place.stacked, place.layer, 0, shape)]
        elif place.name in GATED and f"{place.apart}_w" in self._tensors:
            half = (shape[0] // 2, *shape[1:])
            pieces = [(f"{place.apart}_w", None, 0, half), (f"{place.apart}_v", None, half[0], half)]
        else:
            pieces = [(place.apart, None, 0, shape)]
        parts = [part for piece in pieces for part in self._parts_of(*piece, name=name)]
        used.update(piece[0] for piece in pieces)
        covered = sum(part.numel for part in parts)
        if covered != torch.Size(shape).numel():
            raise CheckpointError(
                f"{self._folder}: {pieces[0][0]}: expected {torch.Size(shape).numel():,} elements for {name}, the "
                f"index has {covered:,}"
            )
        for one, two in itertools.combinations(parts, 2):
            if one.overlaps(two):
                raise CheckpointError(f"{self._folder}: {pieces[0][0]}: expected parts that are apart, two overlap")
        return parts

    def _parts_of(self, key: str, layer: int | None, first: int, shape: tuple[int, ...], *, name: str) -> list[_Part]:
        entry = self._tensors.get(key)
        if entry is None:
            raise CheckpointError(f"{self._folder}: expected a tensor {key} (by its arguments), got none")
        size, expected = tuple(entry.size), shape if layer is None else (self._layers(), *shape)
        if size != expected:
            raise CheckpointError(
                f"{self._folder}: tensor {key}: expected shape {expected} by its arguments, got {size}"
            )
        if entry.properties.dtype not in _TYPES:
            raise CheckpointError(
                f"{self._folder}: tensor {key}: expected fp32, bf16 or fp16, got {entry.properties.dtype}"
            )
        parts = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inner = 0
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                inner, offsets = layer - offsets[0], offsets[1:]
            parts.append(self._part(key, chunk, inner if layer is not None else None, first, offsets))
        return parts

    def _part(
        self, key: str, chunk: ChunkStorageMetadata, inner: int | None, first: int, offsets: tuple[int, ...]
    ) -> _Part:
        info = self._stored.get(MetadataIndex(key, chunk.offsets))
        if info is None or getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self._folder}: tensor {key}: expected its plain bytes in the index, got none")
        path = _stored_file(self._folder, f"tensor {key}", info)
        column = offsets[1] if len(offsets) > 1 else 0
        return _Part(path, info.offset, info.length, tuple(chunk.sizes), inner, first + offsets[0], column)

    def _layers(self) -> int:
        return 1 + max(place.layer for name in self._shapes if (place := place_of(name)).layer is not None)

    def _read(self, name: str, part: _Part) -> Tensor:
        try:
            with part.path.open("rb") as file:
                view: Any = _Slice(file, part.offset, part.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:
            # The text of torch advises to read without weights_only.
            raise CheckpointError(
                f"{part.path}: {name}: expected a tensor that torch saved, got other bytes ({type(error).__name__})"
            ) from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != part.sizes or tensor.dtype not in _TYPES:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{part.path}: {name}: expected a tensor of shape {part.sizes}, got {got}")
        return tensor if part.inner is None else tensor[part.inner]


def read_common(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors, such as the run's arguments.

    It is in common.pt, and since megatron-core 0.19 in an object beside the tensors.

    Args:
        folder: `iter_XXXXXXX`.

    Raises:
        CheckpointError: It is missing or damaged, or holds code.
    """
    path = folder / "common.pt"
    if path.exists():
        return read_pt(path)
    info = read_index(folder / ".metadata").storage_data.get(MetadataIndex(_COMMON))
    if info is None:
        raise CheckpointError(f"{folder}: expected common.pt or an object {_COMMON} in the index, got neither")
    path = _stored_file(folder, _COMMON, info)
    with path.open("rb") as file:
        file.seek(info.offset)
        content = read_object(file.read(info.length), f"{path}: {_COMMON}")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {_COMMON}: expected a dictionary, got {type(content).__name__}")
    return content


def _stored_file(folder: Path, key: str, info: Any) -> Path:
    """Return the file that the index names for a tensor or an object, which has all its bytes."""
    name = info.relative_path
    path = folder / str(name)
    if not isinstance(name, str) or os.path.basename(name) != name or path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{folder}: {key}: expected a file {str(name)[:200]!r}, got none")
    size = path.stat().st_size
    if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
        raise CheckpointError(f"{path}: {key}: expected {info.offset + info.length:,} bytes or more, got {size:,}")
    return path


class _Part:
    """A stored part of a parameter, and where its rows and columns begin."""

    def __init__(
        self, path: Path, offset: int, length: int, sizes: tuple[int, ...], inner: int | None, row: int, column: int
    ) -> None:
        self.path, self.offset, self.length, self.sizes = path, offset, length, sizes
        self.inner, self.row, self.column = inner, row, column
        self.numel = torch.Size(sizes if inner is None else sizes[1:]).numel()

    def overlaps(self, other: _Part) -> bool:
        """Return whether both hold an element of one parameter, so that another element is missing."""
        (rows, columns), (others, across) = self._extent(), other._extent()
        apart = (
            self.row + rows <= other.row,
            other.row + others <= self.row,
            self.column + columns <= other.column,
            other.column + across <= self.column,
        )
        return not any(apart)

    def _extent(self) -> tuple[int, int]:
        sizes = self.sizes if self.inner is None else self.sizes[1:]
        return sizes[0], sizes[1] if len(sizes) > 1 else 1


class _Slice(io.RawIOBase):
    """Bytes `[offset, offset + length)` of a file as a file, without a copy of them."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + position
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return int(count)


def _is_state(key: str) -> bool:
    """Return whether a tensor is of the optimizer, a random state or an extra state, which is not imported."""
    return key.startswith(("optimizer", "chained_", "rng_state", "rerun_state")) or key.endswith("_extra_state")
