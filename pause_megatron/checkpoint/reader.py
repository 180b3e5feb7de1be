"""Pieces of parameters out of a checkpoint, whatever topology wrote it. Reads what is asked for, nothing more."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pause_megatron.checkpoint.manifest import Manifest
from pause_megatron.engine.state import Address
from pause_megatron.errors import CheckpointError


class CheckpointReader:
    """The fragments that belong to one tensor-parallel rank.

    Args:
        folder: a checkpoint
        tp_rank: whose shards to read; the files of the others are not opened

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, folder: Path, tp_rank: int) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        prefix = f"state-tp{tp_rank:02d}-of-{self.manifest.tensor_parallel:02d}-"
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path]]] = defaultdict(list)
        self._open: dict[Path, safe_open] = {}
        for name in sorted(self.manifest.files):
            if name.startswith(prefix):
                self._index(folder / name)

    def read(self, address: Address, key: str) -> Tensor:
        """Elements of one parameter, fp32 [address.numel].

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
        """
        values = torch.empty(address.numel, dtype=torch.float32)
        stop, filled = address.start + address.numel, 0
        for start, numel, path in self._pieces[key, address.name]:
            low, high = max(start, address.start), min(start + numel, stop)
            if low < high:
                piece = self._file(path).get_slice(f"{key}|{address.name}|{start}")
                values[low - address.start : high - address.start] = piece[low - start : high - start]
                filled += high - low
        if filled != address.numel:
            raise CheckpointError(
                f"{self.folder}: expected elements {address.start}..{stop} of {key} {address.name}, "
                f"found {filled} of {address.numel}"
            )
        return values

    def _index(self, path: Path) -> None:
        for label in self._file(path).keys():  # noqa: SIM118 (not a dict)
            key, _, rest = label.partition("|")
            name, _, start = rest.rpartition("|")
            shape = self._file(path).get_slice(label).get_shape()
            if not (key and name and start.isdecimal() and len(shape) == 1):
                raise CheckpointError(
                    f"{path}: expected 1-D tensors named KEY|PARAMETER|START, found {label[:200]!r} of shape {shape}"
                )
            self._pieces[key, name].append((int(start), shape[0], path))

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def open_safetensors(path: Path) -> safe_open:
    """Maps a safetensors file for reading on the CPU.

    Raises:
        CheckpointError: it cannot be read or is no safetensors file.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file: {error}") from None
