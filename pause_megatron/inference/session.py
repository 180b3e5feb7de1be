"""A batch and its key-value cache, some of whose slots may hold nothing.

Rows of a batch differ in length and in their number of pauses. Each forward pass gives every row as many slots as the
longest needs; slots that a row does not use are invalid: no position is counted for them and nobody attends to them.
So left padding, pauses that turn out not to be needed, and rows that have ended are all the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pause_megatron.errors import ConfigError
from pause_megatron.inference.custom_generate import CACHE


class Session:
    """The forward passes of one batch.

    Args:
        model: a transformers causal language model in eval mode.
        rows: size of the batch.

    Attributes:
        forward_passes: calls of the model so far.
        positions: token positions computed so far, those of invalid slots not counted.
        lengths: int64 [rows], valid positions of each row.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)  # filled by the model
        self._valid = torch.zeros(rows, 0, dtype=torch.bool, device=model.device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.forward_passes = 0
        self.positions = 0

    def forward(self, rows: Sequence[Sequence[int]], keep: int = 1, *, bidirectional: bool = False) -> Tensor:
        """Compute the next tokens of every row in one pass.

        Args:
            rows: tokens of each row; shorter rows are padded on the left. A row may have none.
            keep: logits are given for the last `keep` slots.
            bidirectional: these tokens attend to each other in both directions. For the first pass only.

        Returns:
            fp32 [rows, keep, vocab]. A row that has no token in a slot has numbers of no meaning there.
        """
        width = max(map(len, rows))
        padded = [[0] * (width - len(row)) + list(row) for row in rows]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self._model.device)
        counts = torch.tensor([len(row) for row in rows], device=tokens.device)
        valid = torch.arange(width, device=tokens.device) >= width - counts[:, None]
        positions = (self.lengths[:, None] + valid.cumsum(1) - 1).clamp_(min=0)
        self._valid = torch.cat([self._valid, valid], dim=1)
        output = self._model(
            input_ids=tokens,
            attention_mask=self._prefix_mask(valid) if bidirectional else self._mask(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            **{CACHE: self._cache},
        )
        self.lengths += counts
        self.forward_passes += 1
        self.positions += int(counts.sum())
        return output.logits.float()

    def take_back(self, row: int, count: int) -> None:
        """Make the last `count` valid slots of a row invalid, as if they had never been computed."""
        if count:
            self._valid[row, self._valid[row].nonzero()[-count:, 0]] = False
            self.lengths[row] -= count

    def spread(self, rows: Sequence[int]) -> None:
        """Form the batch anew: row i goes on from what was row `rows[i]`. A row may be taken several times."""
        if list(rows) != list(range(len(self.lengths))):
            index = torch.tensor(rows, device=self._model.device)
            self._cache.batch_select_indices(index)
            self._valid, self.lengths = self._valid[index], self.lengths[index]

    def wait(self) -> None:
        """Wait until what was asked of the device is done, so that a clock may be read."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def _mask(self) -> Tensor | None:
        """[rows, slots], or None where all slots are valid: the model then takes its fastest path."""
        return None if self._valid.all() else self._valid.long()

    def _prefix_mask(self, valid: Tensor) -> Tensor:
        """[rows, 1, slots, slots], to be added to the attention scores: every valid slot sees every valid slot.

        Invalid slots see themselves, so that no softmax is over nothing.
        """
        implementation = self._model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ConfigError(
                f"a bidirectional prefix needs the model loaded with attn_implementation='sdpa' or 'eager', it has "
                f"{implementation!r}"
            )
        seen = (valid[:, None, :] & valid[:, :, None]) | torch.eye(
            valid.shape[1], dtype=torch.bool, device=valid.device
        )
        mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=valid.device)
        return mask.masked_fill_(~seen, torch.finfo(self._model.dtype).min)[:, None]
