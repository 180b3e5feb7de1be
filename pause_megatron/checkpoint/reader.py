"""Pieces of parameters out of a checkpoint, whatever topology wrote it. Reads what is asked for, nothing more."""

from __future__ import annotations

import math
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.engine.state import ADAM_STATE, Address
from pause_megatron.errors import CheckpointError

_Piece = tuple[int, int, Path]
"""First element, number of elements, and the file that holds them."""


class CheckpointReader:
    """The fragments that belong to one tensor-parallel rank.

    Args:
        folder: a checkpoint
        tp_rank: whose shards to read; the files of the others are not opened

    Raises:
        CheckpointError: a file cannot be read, or holds something else than 1-D fp32 tensors named KEY|PARAMETER|START.
    """

    def __init__(self, folder: Path, tp_rank: int) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self._open: dict[Path, safe_open] = {}
        for name in self.manifest.state_files(tp_rank):
            self._index(folder / name, pieces)
        self._pieces = {place: sorted(found, key=itemgetter(0, 1)) for place, found in pieces.items()}

    def read(self, address: Address, key: str) -> Tensor:
        """Elements of one parameter, fp32 [address.numel].

        Raises:
            CheckpointError: the checkpoint does not hold each of them once.
        """
        values = torch.empty(address.numel, dtype=torch.float32)
        first, stop = address.start, address.start + address.numel
        found = [piece for piece in self._pieces.get((key, address.name), ()) if _overlap(piece, first, stop)]
        self._require_once(f"{key} {address.name}", first, stop, found)
        for start, numel, path in found:
            low, high = max(start, first), min(start + numel, stop)
            piece = self._file(path).get_slice(f"{key}|{address.name}|{start}")
            values[low - first : high - first] = piece[low - start : high - start]
        return values

    def check_whole(self) -> None:
        """Every element of every parameter of the manifest is there once, of all that Adam keeps; and nothing else.

        Raises:
            CheckpointError: the first that is not.
        """
        expected = {(key, name) for key in ADAM_STATE for name in self.manifest.parameters}
        if unknown := sorted(self._pieces.keys() - expected):
            raise CheckpointError(
                f"{self.folder}: a state file holds {' '.join(unknown[0])}, which the manifest has not"
            )
        for key, name in sorted(expected):
            numel = math.prod(self.manifest.parameters[name].shape)
            pieces = self._pieces.get((key, name), [])
            self._require_once(f"{key} {name}", 0, numel, pieces)
            if (held := sum(count for _, count, _ in pieces)) != numel:
                raise CheckpointError(f"{pieces[-1][2]}: expected {numel} elements of {key} {name}, found {held}")

    def _require_once(self, what: str, first: int, stop: int, pieces: list[_Piece]) -> None:
        """Pieces, in order, cover `[first, stop)` without a gap or an overlap."""
        reached = None
        for start, numel, path in pieces:
            if start > first if reached is None else start != reached:
                fault = "a gap before" if reached is None or start > reached else "more than once from"
                raise CheckpointError(
                    f"{path}: expected elements {first}..{stop} of {what}, each once, found {fault} element {start}"
                )
            reached = start + numel
        if reached is None or reached < stop:
            held = 0 if reached is None else reached - first
            raise CheckpointError(
                f"{self.folder}: expected elements {first}..{stop} of {what}, found {held} of {stop - first}"
            )

    def _index(self, path: Path, pieces: dict[tuple[str, str], list[_Piece]]) -> None:
        for label in self._file(path).keys():  # noqa: SIM118 (not a dict)
            key, _, rest = label.partition("|")
            name, _, start = rest.rpartition("|")
            tensor = self._file(path).get_slice(label)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if not (key and name and start.isdecimal() and len(shape) == 1 and dtype == "F32"):
                raise CheckpointError(
                    f"{path}: expected 1-D F32 tensors named KEY|PARAMETER|START, found {label[:200]!r}, {dtype} of "
                    f"shape {shape}"
                )
            pieces[key, name].append((int(start), shape[0], path))

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def _overlap(piece: _Piece, first: int, stop: int) -> bool:
    return piece[0] < stop and piece[0] + piece[1] > first


def open_safetensors(path: Path) -> safe_open:
    """Maps a safetensors file for reading on the CPU.

    Raises:
        CheckpointError: it cannot be read or is no safetensors file.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file: {error}") from None


def not_finite(path: Path) -> list[str]:
    """What is not a number, infinite, or no second moment in a state file: one line a tensor.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = open_safetensors(path)
    found = (state_fault(label.partition("|")[0], file.get_tensor(label)) for label in file.keys())  # noqa: SIM118
    return [f"{path}: {label}: {fault}" for label, fault in zip(file.keys(), found, strict=True) if fault]


def state_fault(key: str, values: Tensor) -> str:
    """Why these values cannot be one of `ADAM_STATE`; "" when they can."""
    if not values.numel():
        return ""
    low, high = (float(value) for value in torch.aminmax(values.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        return "expected finite numbers, got NaN or infinity"
    return f"expected squares, got {low:g}" if key == "exp_avg_sq" and low < 0 else ""
