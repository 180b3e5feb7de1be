"""Auxiliary heads: further predictions from the position that predicts the answer, as a control for pauses.

Head k predicts hint k, as the heads of multi-token prediction and Medusa do (Gloeckle et al., ICML 2024; Cai et al.,
ICML 2024): a linear map of the hidden state, h + W_k h, before the shared LM head. W_k begins at 0, so each head begins
as the LM head, and weight decay draws it there. Finetuning uses them, and an export leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Hints(NamedTuple):
    """Further targets of a micro-batch. A named tuple, because DeepSpeed's hooks look for tensors in tuples only.

    Attributes:
        rows: Rows that predict them, as `target_rows`, int64 [hints]; those of auxiliary head 0 first.
        targets: Target ids, int64 [hints].
        by_head: Hints of each auxiliary head; () without heads.
        weight: Weight of a hint in the loss.
    """

    rows: Tensor
    targets: Tensor
    by_head: tuple[int, ...] = ()
    weight: float = 1.0


class AuxiliaryHeads(nn.Module):
    """Linear maps of hidden states, one for each hint; every tensor-parallel rank has all of them.

    Args:
        count: Number of heads, K.
        config: Width, type and sequence parallelism of the model.

    Attributes:
        weight: [K x hidden, hidden], the W_k below each other.
    """

    def __init__(self, count: int, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # The device of megatron-core's own parameters.
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.zeros(count * width, width, dtype=config.params_dtype, device=device))
        # Without sequence parallelism, `PauseGPTModel` sums the gradient of the rows, so each rank gets the whole.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, rows: Tensor, by_head: Sequence[int]) -> Tensor:
        """Map rows of hidden states, each by its head.

        Args:
            rows: [rows, hidden]; those of head 0 first.
            by_head: Number of rows of each head; heads after the last entry have none.

        Returns:
            [rows, hidden].
        """
        maps = self.weight.view(-1, rows.shape[-1], rows.shape[-1]).unbind()
        counts = [*by_head, *[0] * (len(maps) - len(by_head))]
        parts = rows.split(counts)
        return rows + torch.cat([nn.functional.linear(part, weight) for part, weight in zip(parts, maps, strict=True)])
