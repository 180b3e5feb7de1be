"""Streaming writer of safetensors files: the header first, from names, types and shapes, then blocks of rows.

`safetensors.torch.save_file` needs all tensors of a file in memory. The format is 8 bytes of header length, a JSON
header, and the tensors one after the other. A writer that knows the shapes can hold a few rows only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorEntry:
    """Name, shape and type of one tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writer of one file: the tensors in the order of the header, each in any number of pieces.

    Args:
        path: Path of the file, which must not exist.
        entries: The tensors.
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": _TYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.bytes],
            }
            offset += entry.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._end = 8 + len(text) + offset
        self._write(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, values: Tensor) -> None:
        """Append values, in row-major order."""
        self._write(memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy().data))

    def zeros(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        """Append zeros, as a hole where the file system supports sparse files.

        Args:
            count: Number of elements.
            dtype: Their type.
        """
        self._file.seek(count * dtype.itemsize, 1)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        written = self._file.tell()
        if kind is None:
            if written != self._end:
                raise AssertionError(
                    f"{self._file.name}: expected {self._end} bytes, as announced in the header, got {written}"
                )
            self._file.truncate(self._end)
        self._file.close()

    def _write(self, data: memoryview) -> None:
        while data.nbytes:  # a raw file may write less than requested
            data = data[self._file.write(data) :]


def split_into_files(entries: Iterable[TensorEntry], largest: int) -> list[list[TensorEntry]]:
    """Group consecutive tensors into files; a tensor larger than `largest` gets a file of its own.

    Args:
        entries: The tensors, in order.
        largest: Maximum size of a file, in bytes.
    """
    files: list[list[TensorEntry]] = []
    size = 0
    for entry in entries:
        if not files or size + entry.bytes > largest:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.bytes
    return files
