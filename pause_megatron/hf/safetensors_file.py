"""Writing a safetensors file a few rows at a time: the header first, from names, types and shapes alone.

`safetensors.torch.save_file` wants all tensors of a file in memory. The format (8 bytes of header length, a JSON
header, the tensors end to end) lets a writer that knows the shapes beforehand hold a block of rows only.
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
class Entry:
    """One tensor of a file to be."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes one file, its tensors in the order announced, each in as many pieces as the caller likes.

    Args:
        path: must not exist
        entries: the tensors
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        header: dict = {"__metadata__": {"format": "pt"}}
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
        """Appends values, contiguous in memory once moved to the CPU."""
        self._write(memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy()))

    def zeros(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        """Appends zeros, as a hole in the file where the file system has such."""
        self._file.seek(count * dtype.itemsize, 1)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        written = self._file.tell()
        if kind is None:
            if written != self._end:
                raise AssertionError(f"{self._file.name}: {written} bytes written, {self._end} announced")
            self._file.truncate(self._end)
        self._file.close()

    def _write(self, data: memoryview) -> None:
        while data.nbytes:  # a raw file may take less than it is given
            data = data[self._file.write(data) :]


def split_into_files(entries: Iterable[Entry], largest: int) -> list[list[Entry]]:
    """Consecutive tensors to a file, at most `largest` bytes each; a tensor that is larger has a file of its own."""
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not files or size + entry.bytes > largest:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.bytes
    return files
