"""Training of only the pause rows, and of LoRA adapters: all other parameters stay bit for bit.

A pause row is a row of a matrix that text uses, too, and checkpoints hold every parameter. So all parameters stay in
the optimizer, and hooks set the gradient of all others to exactly zero before DeepSpeed gets it, at any ZeRO stage.
AdamW leaves those elements unchanged: its moments stay 0, and without weight decay (which the caller switches off) its
update is lr * 0 / (sqrt(0) + eps) = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pause_megatron.model.gpt import PauseGPTModel
from pause_megatron.model.lora import is_adapter


def train_pause_rows_only(model: PauseGPTModel) -> None:
    """Zero every gradient but those of the pause rows, in the embedding and in an untied output layer, and of adapters.

    Call it before `deepspeed.initialize`, and give all parameters a weight decay of 0.

    Args:
        model: This rank's shard.
    """
    group = model.pg_collection.tp
    for parameter in model.parameters():
        if getattr(parameter, "is_embedding_or_output_parameter", False):
            first = group.rank() * parameter.shape[0]
            rows = [row - first for row in model.vocabulary.pause_ids if first <= row < first + parameter.shape[0]]
            parameter.register_hook(_keep_rows(torch.tensor(rows, dtype=torch.int64, device=parameter.device)))
        elif not is_adapter(parameter):
            # Not a product with 0, which would turn an infinite gradient into NaN.
            parameter.register_hook(torch.zeros_like)


def _keep_rows(rows: Tensor) -> Callable[[Tensor], Tensor]:
    def keep(gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient).index_copy(0, rows, gradient.index_select(0, rows))

    return keep
