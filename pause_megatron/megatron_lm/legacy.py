"""Reader of the folders `mp_rank_*` of a Megatron-LM checkpoint (`--ckpt-format torch`), with safe loading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pause_megatron.checkpoint.layout import partition_dim, row_spans, shard_shape
from pause_megatron.errors import CheckpointError
from pause_megatron.megatron_lm.names import FUSED, place_of
from pause_megatron.megatron_lm.safe import read_pt

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAPPED_BYTES = 128 << 20
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_VERSION = 3.0


class _Found(NamedTuple):
    """Where the shards of a native parameter are: pipeline rank and name there."""

    pipeline: int
    name: str


class LegacyWeights:
    """Tensors of `mp_rank_*` folders, by native name.

    Args:
        folder: `iter_XXXXXXX`.

    Raises:
        CheckpointError: A rank's folder is missing, a file is damaged or names code, or the layout is another.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = _rank_files(folder)
        self._tensor = 1 + max(rank for rank, _ in self._paths)
        self._open: dict[tuple[int, int], dict[str, Any]] = {}
        self._mapped = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._found: dict[str, _Found] = {}
        first = read_pt(self._paths[0, 0], mmap=True)
        version = first.get("checkpoint_version", 0)
        if version != _VERSION:
            raise CheckpointError(
                f"{self._paths[0, 0]}: checkpoint_version: expected {_VERSION}, got {str(version)[:40]!r}"
            )
        self.args = first.get("args")
        self.names = self._index()

    def vocabulary_rows(self) -> int:
        """Return the rows of the embedding, padding included."""
        found = self.names.get("embedding.word_embeddings.weight")
        if found is None:
            raise CheckpointError(f"{self._folder}: expected a tensor embedding.word_embeddings.weight, got none")
        return int(self._state(0, found.pipeline)[found.name].shape[0]) * self._tensor

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those that the arguments describe.

        Args:
            shapes: Merged shape of every native parameter, with the vocabulary rows of the checkpoint.

        Raises:
            CheckpointError: A tensor that is missing, unknown, of another shape or another type.
        """
        for name, shape in shapes.items():
            found = self.names.get(place_of(name).apart)
            if found is None:
                raise CheckpointError(f"{self._folder}: expected a tensor {name} (by its arguments), got none")
            expected = shard_shape(name, shape, self._tensor)
            for rank in range(self._tensor):
                tensor = self._state(rank, found.pipeline).get(found.name)
                if not isinstance(tensor, Tensor) or tuple(tensor.shape) != expected or tensor.dtype not in _TYPES:
                    got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else "none"
                    raise CheckpointError(
                        f"{self._paths[rank, found.pipeline]}: tensor {found.name}: expected shape {expected} in fp32, "
                        f"bf16 or fp16 by its arguments, got {got}"
                    )
            self._found[name] = found
        unknown = sorted(self.names.keys() - {place_of(name).apart for name in shapes})
        if unknown:
            raise CheckpointError(
                f"{self._folder}: expected tensors of the model that its arguments describe, got a tensor "
                f"{unknown[0]!r} (and {len(unknown) - 1} more)"
            )
        self._shapes = shapes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[start, stop)` of a native parameter, fp32 [stop - start, ...].

        Args:
            name: Native parameter name.
            start: First row.
            stop: Row after the last.
        """
        shape = self._shapes[name]
        if partition_dim(name) == 1:
            return torch.cat([self._piece(name, rank, start, stop) for rank in range(self._tensor)], dim=1)
        pieces = []
        for span in row_spans(name, shape[0], self._tensor):
            low, high = max(start, span.start), min(stop, span.start + span.count)
            if low < high:
                offset = span.local - span.start
                pieces.append(self._piece(name, span.rank, low + offset, high + offset))
        return torch.cat(pieces)

    def _piece(self, name: str, rank: int, start: int, stop: int) -> Tensor:
        found = self._found[name]
        if self._mapped > _MAPPED_BYTES:  # the pages of a memory map stay until its file is closed
            self._open.clear()
            self._mapped = 0
        piece = self._state(rank, found.pipeline)[found.name][start:stop]
        self._mapped += piece.numel() * piece.element_size()
        return piece.to(torch.float32, copy=True)

    def _state(self, rank: int, pipeline: int) -> dict[str, Any]:
        if (rank, pipeline) not in self._open:
            path = self._paths[rank, pipeline]
            content = read_pt(path, mmap=True)
            model = content.get("model")
            if "model0" in content:
                raise CheckpointError(f"{path}: expected a tensor dictionary 'model', got virtual pipeline stages")
            if not isinstance(model, dict) or "language_model" in model:
                raise CheckpointError(f"{path}: expected megatron-core's tensors under 'model', got another layout")
            self._open[rank, pipeline] = model
        return self._open[rank, pipeline]

    def _index(self) -> dict[str, _Found]:
        """Return where each parameter is, by its name with the layer's number in the whole model."""
        names: dict[str, _Found] = {}
        before = 0
        for pipeline in range(1 + max(stage for _, stage in self._paths)):
            layers = 0
            for local, value in self._state(0, pipeline).items():
                if local.endswith("_extra_state") or not isinstance(value, Tensor):
                    continue
                name, match = local, _LAYER.match(local)
                if match is not None:
                    layers = max(layers, 1 + int(match[1]))
                    rest = local[match.end() :]
                    name = f"decoder.layers.{before + int(match[1])}.{FUSED.get(rest, rest)}"
                names.setdefault(name, _Found(pipeline, local))  # the last stage of a tied model has a copy
            before += layers
        if "embedding.word_embeddings.weight" in names and self._is_tied():
            names.pop("output_layer.weight", None)
        return names

    def _is_tied(self) -> bool:
        return getattr(self.args, "untie_embeddings_and_output_weights", None) is False


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the file of each (tensor-parallel, pipeline) rank, all of which exist."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(path.name)
        if match is None:
            continue
        if match[3]:
            raise CheckpointError(f"{path}: expected tensor and pipeline parallelism only, got expert parallelism")
        found[int(match[1]), int(match[2] or 0)] = path / FILE
    if not found:
        raise CheckpointError(f"{folder}: expected metadata.json (torch_dist) or folders mp_rank_XX, got neither")
    tensor, stages = (1 + max(key[axis] for key in found) for axis in (0, 1))
    for rank in range(tensor):
        for stage in range(stages):
            if not found.get((rank, stage), folder / "none").is_file():
                raise CheckpointError(
                    f"{folder}: expected {FILE} of {tensor} tensor-parallel x {stages} pipeline ranks, got none of "
                    f"rank ({rank}, {stage})"
                )
    return found
