"""Writer of `mp_rank_XX` folders, one tensor-parallel rank at a time: memory is that of a rank's shard in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pause_megatron.hf.checkpoint import NativeCheckpoint
from pause_megatron.hf.weights import native_shapes
from pause_megatron.megatron_lm.legacy import FILE
from pause_megatron.megatron_lm.names import place_of
from pause_megatron.megatron_lm.native import shard_of
from pause_megatron.terminal.progress import Report


def write_legacy(
    folder: Path, checkpoint: NativeCheckpoint, rows: int, ranks: int, common: dict[str, Any], report: Report
) -> None:
    """Write the folders of all tensor-parallel ranks.

    Norms have the names of Transformer Engine's layers, as in torch_dist.

    Args:
        folder: `iter_XXXXXXX`, which does not exist.
        checkpoint: The checkpoint to export.
        rows: Vocabulary rows, padding included.
        ranks: Tensor-parallel size.
        common: What every rank's file holds beside the tensors.
        report: Progress callback.
    """
    model = checkpoint.config.model
    shapes = native_shapes(model, rows)
    for rank in range(ranks):
        state: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            layer = place_of(name).layer
            if layer is None:
                state[name] = shard_of(checkpoint, name, shape, rank, ranks)
                continue
            for number in [number for number, copied in enumerate(model.order) if copied == layer]:
                state[place_of(name)._replace(layer=number).apart] = shard_of(checkpoint, name, shape, rank, ranks)
        path = folder / f"mp_rank_{rank:02d}" / FILE
        path.parent.mkdir(parents=True)
        torch.save({**common, "model": state}, path)
        report("writing weights", rank + 1, ranks)
