"""Reader of an untrusted Hugging Face folder: plain files inside it, JSON of bounded size, safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pause_megatron.checkpoint.reader import open_safetensors
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.weights import config_keys_of

_JSON_BYTES = 64 << 20
_MAPPED_BYTES = 128 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TYPES = ("F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"


class SourceFolder:
    """An untrusted folder.

    Args:
        path: Path of the folder.

    Raises:
        CheckpointError: No such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path}: expected a Hugging Face folder, got none (Hub names are not supported)"
            )
        self._root = self.path.resolve()

    def has(self, name: str) -> bool:
        """Return whether the folder has a file of that name."""
        return (self.path / name).exists() or (self.path / name).is_symlink()

    def file(self, name: str) -> Path:
        """Return the path of a file of the folder.

        Links into the `blobs` of a Hugging Face cache are followed, since the cache consists of them.

        Args:
            name: Name of the file.

        Raises:
            CheckpointError: The file is missing, not a plain file, or outside the folder (by its name or as a link).
        """
        if not isinstance(name, str) or not name or Path(name).name != name or name in (".", "..") or "\\" in name:
            raise CheckpointError(f"{self.path}: expected names of files in this folder, got {str(name)[:200]!r}")
        return self._inside(self.path / name, self._root)

    def files_in(self, name: str) -> list[Path]:
        """Return the paths of the files of a subfolder; empty without it.

        Args:
            name: Name of the subfolder.

        Raises:
            CheckpointError: The subfolder or one of its entries is a link out of the folder, or not a file.
        """
        inner = self.path / name
        if not self.has(name):
            return []
        if inner.is_symlink() or not inner.is_dir():
            raise CheckpointError(f"{inner}: expected a folder, got something else")
        return [self._inside(path, self._root / name) for path in sorted(inner.iterdir())]

    def _inside(self, path: Path, parent: Path) -> Path:
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file, got none")
        target = path.resolve()
        blobs = self._root.parent.parent / "blobs"
        in_cache = self._root.parent.name == "snapshots" and target.parent == blobs
        if target.parent != parent and not in_cache:
            raise CheckpointError(
                f"{path}: expected a file of the folder, got a link out of the folder, to {target}; copy it"
            )
        return path

    def json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file that holds one object.

        Args:
            name: Name of the file.

        Raises:
            CheckpointError: As for `file`, or not JSON, too large or too deep.
        """
        path = self.file(name)
        if path.stat().st_size > _JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most {_JSON_BYTES:,} bytes, got {path.stat().st_size:,}")
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected JSON, got {str(error)[:200]}") from None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(record).__name__}")
        return record

    def indexed(self) -> dict[str, str]:
        """Return the file of each tensor by the index; empty without one.

        Raises:
            CheckpointError: The index is not one.
        """
        if not self.has(INDEX):
            return {}
        weight_map = self.json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{self.path / INDEX}: expected a weight_map of tensors to files, got none")
        return weight_map

    def weight_files(self) -> list[str]:
        """Return the names of the safetensors files.

        Raises:
            CheckpointError: There are none, or only pickles.
        """
        if self.has(INDEX):
            weight_map = self.indexed()
            names = dict.fromkeys(weight_map.values())
            for name in names:
                if Path(name).name == name and not self.has(name):
                    held = sum(file == name for file in weight_map.values())
                    raise CheckpointError(
                        f"{self.path / name}: expected the file that {INDEX} names for {held} tensors, got none"
                    )
                if self.file(name).suffix != ".safetensors":
                    raise CheckpointError(f"{self.path / INDEX}: expected names of .safetensors files, got {name!r}")
            return list(names)
        if self.has("model.safetensors"):
            return ["model.safetensors"]
        pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in _PICKLES)
        if pickles:
            command = f"M.from_pretrained('{self.path}').save_pretrained('CONVERTED')"
            raise CheckpointError(
                f"{self.path}: expected safetensors, got pickles ({', '.join(pickles[:3])}), which can run any code "
                "when they are opened, and are not opened. If you trust their source, convert them once: python -c "
                f'"from transformers import AutoModelForCausalLM as M; {command}"'
            )
        raise CheckpointError(f"{self.path}: expected model.safetensors or {INDEX}, got neither")


class SourceWeights:
    """Tensors of a folder's safetensors files, read a few rows at a time.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: A file that is not safetensors, or a tensor that occurs twice or is of another type.
    """

    def __init__(self, folder: SourceFolder) -> None:
        self._folder = folder
        self._open: dict[Path, Any] = {}
        self._mapped = 0
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in folder.weight_files():
            self._index(folder.file(name))
        for name, file in folder.indexed().items():
            if name not in self._file_of or self._file_of[name].name != file:
                raise CheckpointError(
                    f"{folder.path / file}: expected a tensor {name[:200]}, which {INDEX} places there, got none"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    def check(self, shapes: dict[str, tuple[int, ...]], unused: tuple[str, ...] = ()) -> None:
        """Compare names and shapes.

        Args:
            shapes: Shape of every expected tensor, by name.
            unused: Suffixes of names that may occur too, and are not read.

        Raises:
            CheckpointError: A tensor that is missing, unknown, or of another shape.
        """
        for name, path in self._file_of.items():
            if name not in shapes and not name.endswith(unused):
                raise CheckpointError(
                    f"{path}: expected tensors of config.json's model only ({config_keys_of(name)}), got a tensor "
                    f"{name[:200]!r}"
                )
            if name in shapes:
                self.expect(name, shapes[name])
        if missing := sorted(shapes.keys() - self._file_of.keys()):
            raise CheckpointError(
                f"{self._folder.path}: expected a tensor {missing[0]} (and {len(missing) - 1} more) by config.json "
                f"({config_keys_of(missing[0])}), got none"
            )

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Compare the shape of a tensor, if the files have it.

        Args:
            name: Name of the tensor.
            shape: The expected shape.

        Raises:
            CheckpointError: It has another shape.
        """
        if self._shapes.get(name, shape) != shape:
            raise CheckpointError(
                f"{self._file_of[name]}: tensor {name}: expected shape {shape} by config.json "
                f"({config_keys_of(name)}), got {self._shapes[name]}"
            )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[start, stop)` of a tensor, fp32 [stop - start, ...]; the conversion is exact for every type."""
        path = self._file_of[name]
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
            if name in self._file_of:
                raise CheckpointError(
                    f"{path}: tensor {name}: expected it once, got it in {self._file_of[name].name} too"
                )
            entry = file.get_slice(name)
            if entry.get_dtype() not in _TYPES:
                raise CheckpointError(f"{path}: tensor {name}: expected {' or '.join(_TYPES)}, got {entry.get_dtype()}")
            self._file_of[name] = path
            self._shapes[name] = tuple(entry.get_shape())

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]
