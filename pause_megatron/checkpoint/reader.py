"""Reading the shards that one tensor-parallel rank wrote, at any data-parallel size and ZeRO stage."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pause_megatron.checkpoint.format import ADAM_STATE, SECOND_MOMENT, TensorName
from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.engine.state import Address
from pause_megatron.errors import CheckpointError

_BLOCK = 4 << 20
_MAPPED_BYTES = 128 << 20


class _Piece(NamedTuple):
    """Elements `[start, start + numel)` of a flattened shard, and the state file that holds them."""

    start: int
    numel: int
    path: Path

    def overlaps(self, first: int, stop: int) -> bool:
        return self.start < stop and self.start + self.numel > first


class CheckpointReader:
    """The shards that one tensor-parallel rank wrote. Only its state files are opened, and only what is asked for read.

    Args:
        folder: A checkpoint.
        tp_rank: Tensor-parallel rank whose shards are read.

    Raises:
        CheckpointError: A file cannot be read, or holds a tensor that is not 1-D fp32 named KEY|PARAMETER|START.
    """

    def __init__(self, folder: Path, tp_rank: int) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self._open: dict[Path, safe_open] = {}
        for name in self.manifest.state_files(tp_rank):
            self._index(folder / name, pieces)
        self._pieces = {tensor: sorted(parts) for tensor, parts in pieces.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of this rank's shard of each parameter, by native name."""
        return self.manifest.shard_shapes

    def read(self, address: Address, key: str) -> Tensor:
        """Return elements of one flattened shard, fp32 [address.numel].

        Args:
            address: Parameter and its elements.
            key: One of `ADAM_STATE`.

        Raises:
            CheckpointError: The checkpoint does not hold each element once.
        """
        values = torch.empty(address.numel, dtype=torch.float32)
        first, stop = address.start, address.start + address.numel
        pieces = [piece for piece in self._pieces.get((key, address.name), ()) if piece.overlaps(first, stop)]
        self._require_once(f"{key} {address.name}", first, stop, pieces)
        for start, numel, path in pieces:
            low, high = max(start, first), min(start + numel, stop)
            piece = self._file(path).get_slice(str(TensorName(key, address.name, start)))
            values[low - first : high - first] = piece[low - start : high - start]
        return values

    def check_whole(self) -> None:
        """Check that each element of each parameter is there once, as master and both moments, and nothing else is.

        Raises:
            CheckpointError: An element is missing or there twice, or a tensor is of no parameter of the manifest.
        """
        expected = {(key, name) for key in ADAM_STATE for name in self.manifest.parameters}
        if unknown := sorted(self._pieces.keys() - expected):
            raise CheckpointError(
                f"{self.folder}: expected parameters of the manifest in the state files, got {' '.join(unknown[0])}"
            )
        for key, name in sorted(expected):
            numel = math.prod(self.manifest.parameters[name].shape)
            pieces = self._pieces.get((key, name), [])
            self._require_once(f"{key} {name}", 0, numel, pieces)
            if (held := sum(piece.numel for piece in pieces)) != numel:
                raise CheckpointError(f"{pieces[-1].path}: expected {numel} elements of {key} {name}, got {held}")

    def _require_once(self, what: str, first: int, stop: int, pieces: list[_Piece]) -> None:
        """Check that ascending pieces cover `[first, stop)` without a gap or an overlap."""
        reached = None
        for start, numel, path in pieces:
            if start > first if reached is None else start != reached:
                fault = "a gap before" if reached is None or start > reached else "more than once from"
                raise CheckpointError(
                    f"{path}: expected elements {first}..{stop} of {what}, each once, got {fault} element {start}"
                )
            reached = start + numel
        if reached is None or reached < stop:
            held = 0 if reached is None else reached - first
            raise CheckpointError(
                f"{self.folder}: expected elements {first}..{stop} of {what}, got {held} of {stop - first}"
            )

    def _index(self, path: Path, pieces: dict[tuple[str, str], list[_Piece]]) -> None:
        for label in self._file(path).keys():  # noqa: SIM118 (not a dict)
            tensor_name, tensor = TensorName.parse(label), self._file(path).get_slice(label)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if tensor_name is None or len(shape) != 1 or dtype != "F32":
                raise CheckpointError(
                    f"{path}: expected 1-D F32 tensors named KEY|PARAMETER|START, got {label[:200]!r}, {dtype} of "
                    f"shape {shape}"
                )
            pieces[tensor_name.key, tensor_name.parameter].append(_Piece(tensor_name.start, shape[0], path))

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file as a memory map on the CPU.

    Args:
        path: The file.

    Raises:
        CheckpointError: It cannot be read or is not a safetensors file.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file: {error}") from None


def state_file_faults(path: Path) -> list[str]:
    """Return what is not finite, or a negative second moment, in a state file: one line a tensor.

    Args:
        path: The state file.

    Raises:
        CheckpointError: It cannot be read.
    """
    file, mapped, faults = open_safetensors(path), 0, []
    for label in list(file.keys()):
        name = TensorName.parse(label)
        shape, fault = file.get_slice(label).get_shape(), ""
        for start in range(0, shape[0] if shape else 0, _BLOCK):
            if mapped > _MAPPED_BYTES:  # the pages of a memory map stay until its file is closed
                file, mapped = open_safetensors(path), 0
            values = file.get_slice(label)[start : start + _BLOCK]
            mapped += values.numel() * values.element_size()
            fault = fault or state_fault(name.key if name else "", values)
        if fault:
            faults.append(f"{path}: {label}: {fault}")
    return faults


def state_fault(key: str, values: Tensor) -> str:
    """Return why values cannot be one of `ADAM_STATE`, or "" where they can.

    Args:
        key: One of `ADAM_STATE`.
        values: Tensor of any shape.
    """
    if not values.numel():
        return ""
    low, high = (float(value) for value in torch.aminmax(values.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        return "expected finite numbers, got NaN or infinity"
    return f"expected squares, got {low:g}" if key == SECOND_MOMENT and low < 0 else ""
