"""Reading a Hugging Face folder that somebody else made: plain files inside it, JSON of bounded size, safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pause_megatron.checkpoint.reader import open_safetensors
from pause_megatron.errors import CheckpointError

_JSON_BYTES = 64 << 20
_MAPPED_BYTES = 128 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TYPES = ("F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"


class SourceFolder:
    """A folder of which no file is trusted.

    Args:
        path: the folder

    Raises:
        CheckpointError: no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path}: expected a Hugging Face folder, found none (names of a Hub are not taken)"
            )
        self._root = self.path.resolve()

    def has(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return (self.path / name).exists() or (self.path / name).is_symlink()

    def file(self, name: str) -> Path:
        """Path of a file of the folder.

        Raises:
            CheckpointError: it is missing, not a plain file, or lies elsewhere (by its name or as a link). Links into
                the `blobs` of a Hugging Face cache are the way that cache is made, and followed.
        """
        if not isinstance(name, str) or not name or Path(name).name != name or name in (".", "..") or "\\" in name:
            raise CheckpointError(f"{self.path}: expected names of files in this folder, came {str(name)[:200]!r}")
        return self._inside(self.path / name, self._root)

    def files_in(self, name: str) -> list[Path]:
        """Paths of the files of a folder inside the folder; none where it is not there.

        Raises:
            CheckpointError: it or one of them lies elsewhere, or is no file.
        """
        inner = self.path / name
        if not self.has(name):
            return []
        if inner.is_symlink() or not inner.is_dir():
            raise CheckpointError(f"{inner}: expected a folder")
        return [self._inside(path, self._root / name) for path in sorted(inner.iterdir())]

    def _inside(self, path: Path, parent: Path) -> Path:
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file, found none")
        target = path.resolve()
        blobs = self._root.parent.parent / "blobs"
        in_cache = self._root.parent.name == "snapshots" and target.parent == blobs
        if target.parent != parent and not in_cache:
            raise CheckpointError(f"{path}: a link out of the folder, to {target}; copy the file in its place")
        return path

    def json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file that holds one object.

        Raises:
            CheckpointError: as `file`, or not JSON, too large or too deep.
        """
        path = self.file(name)
        if path.stat().st_size > _JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most {_JSON_BYTES:,} bytes, found {path.stat().st_size:,}")
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected JSON: {str(error)[:200]}") from None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(record).__name__}")
        return record

    def weight_files(self) -> list[str]:
        """Names of the safetensors files.

        Raises:
            CheckpointError: there are none, or only pickles.
        """
        if self.has(INDEX):
            weight_map = self.json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{self.path / INDEX}: expected a weight_map of tensors to files, found none")
            names = dict.fromkeys(weight_map.values())
            for name in names:
                if self.file(name).suffix != ".safetensors":
                    raise CheckpointError(f"{self.path / INDEX}: expected names of .safetensors files, came {name!r}")
            return list(names)
        if self.has("model.safetensors"):
            return ["model.safetensors"]
        pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in _PICKLES)
        if pickles:
            command = f"M.from_pretrained('{self.path}').save_pretrained('CONVERTED')"
            raise CheckpointError(
                f"{self.path}: its weights are pickles ({', '.join(pickles[:3])}), which can run any code when they "
                "are opened, and are not. If you trust whoever made them, convert them once: python -c "
                f'"from transformers import AutoModelForCausalLM as M; {command}"'
            )
        raise CheckpointError(f"{self.path}: expected model.safetensors or {INDEX}, found neither")


class SourceWeights:
    """The tensors of a folder's safetensors files, a few rows at a time.

    Args:
        folder: where

    Raises:
        CheckpointError: a file that is not safetensors; a tensor that is there twice or of another type.
    """

    def __init__(self, folder: SourceFolder) -> None:
        self._folder = folder
        self._open: dict[Path, Any] = {}
        self._mapped = 0
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in folder.weight_files():
            self._index(folder.file(name))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self._where)

    def check(self, shapes: dict[str, tuple[int, ...]], unused: tuple[str, ...] = ()) -> None:
        """Compares names and shapes.

        Args:
            shapes: of every tensor that must be there
            unused: ends of names that may be there besides, and are not read

        Raises:
            CheckpointError: a tensor that is missing, unknown, or of another shape.
        """
        for name, path in self._where.items():
            if name not in shapes and not name.endswith(unused):
                raise CheckpointError(f"{path}: a tensor {name[:200]!r}, which the model of config.json does not have")
            if name in shapes and self._shapes[name] != shapes[name]:
                raise CheckpointError(
                    f"{path}: tensor {name}: expected shape {shapes[name]} by config.json, found {self._shapes[name]}"
                )
        if missing := sorted(shapes.keys() - self._where.keys()):
            raise CheckpointError(
                f"{self._folder.path}: expected a tensor {missing[0]} (and {len(missing) - 1} more), found none"
            )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, fp32 [stop - start, ...]; exact, whatever the type."""
        path = self._where[name]
        piece = self._file(path).get_slice(name)[start:stop]
        self._mapped += piece.numel() * piece.element_size()
        values = piece.to(torch.float32, copy=True)
        if self._mapped > _MAPPED_BYTES:  # the pages of a memory map stay until its file is closed
            self._open.clear()
            self._mapped = 0
        return values

    def _index(self, path: Path) -> None:
        file = self._file(path)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in self._where:
                raise CheckpointError(f"{path}: tensor {name} is in {self._where[name].name} too")
            entry = file.get_slice(name)
            if entry.get_dtype() not in _TYPES:
                raise CheckpointError(
                    f"{path}: tensor {name}: expected {' or '.join(_TYPES)}, found {entry.get_dtype()}"
                )
            self._where[name] = path
            self._shapes[name] = tuple(entry.get_shape())

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]
