"""Restoring: the weights into a fresh model, then the optimizer state into the engine that DeepSpeed built from it.

The weights go first, because DeepSpeed cuts, casts and keeps copies of them in ways that differ by stage; built from
the right weights, all of its copies are right. The fp32 masters are overwritten afterwards: under bf16 DeepSpeed would
have made them from the rounded weights.
"""

from __future__ import annotations

import torch
from torch import nn

from pause_megatron.checkpoint.merge import ShardReader
from pause_megatron.checkpoint.reader import CheckpointReader
from pause_megatron.engine import ADAM_STATE, Address, Engine
from pause_megatron.engine.state import MASTER
from pause_megatron.errors import CheckpointError


def restore_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Copies the master weights of this tensor-parallel rank into a model, before DeepSpeed sees it.

    Raises:
        CheckpointError: names or shapes differ: the checkpoint is of another model.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    found = {name: entry.shape for name, entry in reader.manifest.parameters.items()}
    if expected != found:
        name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise CheckpointError(
            f"{reader.folder}: a checkpoint of another model: parameter {name} has shape {found.get(name, 'none')} "
            f"in the checkpoint and {expected.get(name, 'none')} in this run"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = reader.read(Address(name, 0, parameter.numel()), MASTER)
                parameter.copy_(values.view_as(parameter))


def restore_engine(engine: Engine, reader: CheckpointReader | ShardReader) -> None:
    """Overwrites the fp32 masters and Adam's moments and step with the checkpoint's."""
    for address in engine.state.needed():
        for key in ADAM_STATE:
            engine.state.set(address, key, reader.read(address, key))
    engine.state.step = reader.manifest.optimizer_step
