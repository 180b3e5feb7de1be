"""Reading of Megatron-LM's pickles without running code from them.

`common.pt` and `model_optim_rng.pt` are read by torch's own `weights_only` reader. It builds values of a few known
types; others that Megatron-LM writes (enumerations, random states) become inert records. Every other name is refused
before the file is opened. `.metadata` is a plain pickle: only the data classes of torch.distributed.checkpoint are
built.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pause_megatron.errors import CheckpointError

PROPERTIES = 5
"""Values of a tensor's properties in `.metadata` that every release of torch reads."""

_METADATA_BYTES = 1 << 30
# Python 3.10 names an enumeration's value itself: signal.SIGTERM.
_INERT_PREFIXES = ("megatron.", "transformer_engine", "numpy.", "nvidia_resiliency_ext.", "modelopt.", "signal.SIG")
_INERT = frozenset(
    {
        *("signal.Signals", "datetime.timedelta", "pathlib.PosixPath", "pathlib.Path", "pathlib._local.PosixPath"),
        *("io.BytesIO", "_io.BytesIO", "_codecs.encode", "torch.serialization._get_layout"),
        *("torch.distributed.distributed_c10d.ReduceOp", "torch._C._distributed_c10d.ReduceOp"),
    }
)
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_INDEX_NAMES = {
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


class Inert:
    """A value whose type is not imported; its arguments and state are kept, nothing is run."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Keep the arguments that the pickle has for the type."""
        made = super().__new__(cls)
        made.args = args
        return made

    args: tuple[Any, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return hash(repr(self.args))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and self.args == other.args


def read_pt(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a `.pt` file of Megatron-LM.

    Args:
        path: `common.pt` or `model_optim_rng.pt`.
        mmap: Whether tensors are maps of the file's pages, which are read when they are used.

    Raises:
        CheckpointError: The file is missing or damaged, or it names a type or function that Megatron-LM does not write.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, got none")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: expected a file of torch.save (a zip archive), got another or a damaged one")
    content = _load(str(path), str(path), mmap=mmap)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def read_object(data: bytes, where: str) -> Any:
    """Read a sharded object of a torch_dist checkpoint.

    Args:
        data: What torch.save wrote: a list of one value.
        where: Names the file in messages.

    Returns:
        The value.

    Raises:
        CheckpointError: As `read_pt`.
    """
    content = _load(io.BytesIO(data), where)
    if not isinstance(content, list) or len(content) != 1:
        raise CheckpointError(f"{where}: expected a list of one value, got {type(content).__name__}")
    return content[0]


def _load(source: Any, where: str, *, mmap: bool = False) -> Any:
    try:
        names = get_unsafe_globals_in_checkpoint(source)
    except Exception as error:
        raise CheckpointError(f"{where}: expected a file of torch.save, got: {_line(error)}") from None
    allowed: list[Any] = []
    for name in names:
        if name == "argparse.Namespace":
            allowed.append(argparse.Namespace)
        elif name in _INERT or name.startswith(_INERT_PREFIXES):
            allowed.append((type("Inert", (Inert,), {}), name))
        else:
            raise CheckpointError(
                f"{where}: expected values that Megatron-LM saves, got {name}, which can run code; not opened"
            )
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        with safe_globals(allowed):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(f"{where}: expected a file of torch.save, got: {_line(error)}") from None


def read_index(path: Path) -> Any:
    """Read `.metadata`, the index of a torch_dist checkpoint.

    Args:
        path: The file.

    Returns:
        A `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        CheckpointError: The file is missing, damaged or too large, or it names anything but torch's data classes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the index of a torch_dist checkpoint, got none")
    if path.stat().st_size > _METADATA_BYTES:
        raise CheckpointError(f"{path}: expected at most {_METADATA_BYTES:,} bytes, got {path.stat().st_size:,}")
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file, path).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected an index of torch.distributed.checkpoint, got: {_line(error)}"
        ) from None
    if not isinstance(getattr(index, "state_dict_metadata", None), dict) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{path}: expected torch's index of tensors, got {type(index).__name__}")
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not _is_whole(entry):
            raise CheckpointError(f"{path}: {str(key)[:200]}: expected parts within its shape, got others")
    for key, info in index.storage_data.items():
        if type(info) is not _StorageInfo or type(info.offset) is not int or type(info.length) is not int:
            raise CheckpointError(f"{path}: {str(key)[:200]}: expected a place in a file, got another value")
    return index


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Return whether a tensor's shape and parts are numbers, and the parts within the shape."""
    try:
        return isinstance(entry.properties, TensorProperties) and all(
            len(entry.size) == len(chunk.offsets) == len(chunk.sizes)
            and all(
                type(offset) is type(size) is type(whole) is int and 0 <= offset <= offset + size <= whole
                for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            for chunk in entry.chunks
        )
    except (AttributeError, TypeError):
        return False


class _Properties(TensorProperties):
    """Properties of a tensor as any release of torch writes them: strides, which 2.15 adds, are left out."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(tuple(state)[:PROPERTIES])


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that knows torch's data classes only."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return a type of the index; of others, an inert record or none at all."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in _INDEX_NAMES:
            return collections.OrderedDict if name == "OrderedDict" else super().find_class(module, name)
        if (module, name) == (TensorProperties.__module__, TensorProperties.__qualname__):
            return _Properties
        if module in _INDEX_MODULES and name[:1].isupper() | name.startswith("_MEM") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module.startswith("megatron.core.") and name.startswith("MCore"):
            return type(name, (Inert,), {})  # written by 0.13 to 0.15, holds no tensor
        if (module, name) in {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}:
            return type(name, (Inert,), {})
        raise CheckpointError(
            f"{self._path}: expected torch's index of tensors, got {module}.{name}, which can run code; not opened"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
