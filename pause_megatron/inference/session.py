"""A batch and its key-value cache, with slots that may be invalid.

The rows of a batch differ in length and in their number of pauses. Each forward pass gives every row as many cache
slots as the longest row needs. Slots that a row does not use are invalid: they have no position and are masked out of
attention. Left padding, pauses that turn out not to be needed, and rows that have ended are all handled this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pause_megatron.errors import ConfigError
from pause_megatron.inference.custom_generate import CACHE

_EXACT = ("sdpa", "eager")
"""Attention implementations of transformers that take masks, and positions, of any kind."""


class Session:
    """Forward passes of one batch.

    Args:
        model: A transformers causal language model in eval mode.
        rows: Batch size.
        without_positions: Ids of pauses that have the position of the text token before them, as fillers in their place
            then have; None: every token uses up a position.

    Attributes:
        forward_passes: Forward passes so far.
        positions: Tokens computed so far, invalid slots not counted.
        lengths: Positions that the valid slots of each row use up, int64 [batch].

    Raises:
        ConfigError: Pauses without positions, and an attention that would take them for several packed texts.
    """

    def __init__(self, model: Any, rows: int, without_positions: range | None = None) -> None:
        implementation = model.config._attn_implementation
        if without_positions is not None and implementation not in _EXACT:
            raise ConfigError(
                "pause.positions=shared: expected a model loaded with attn_implementation='sdpa' or 'eager', got "
                f"{implementation!r}, which takes repeated positions for the beginnings of other texts"
            )
        self._model, self._without_positions = model, without_positions
        self._cache = DynamicCache(config=model.config)  # filled by the model
        self._valid = torch.zeros(rows, 0, dtype=torch.bool, device=model.device)
        self._counted = self._valid  # slots that use up a position
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.forward_passes = 0
        self.positions = 0

    def forward(
        self,
        rows: Sequence[Sequence[int]],
        keep: int = 1,
        *,
        bidirectional: bool = False,
        pauses: Sequence[Sequence[bool]] | None = None,
        last: bool = False,
    ) -> Tensor:
        """Compute the next tokens of every row in one forward pass.

        Args:
            rows: Token ids of each row; shorter rows are padded, on the left unless it is the last pass. A row may be
                empty.
            keep: Number of slots, from the end, whose logits are returned.
            bidirectional: Let these tokens attend to each other in both directions; in the first pass only.
            pauses: Which tokens of each row are pauses or fillers in their place; None: those with a pause's id. It
                matters to pauses without positions only.
            last: Whether it is the last pass. Rows are then padded on the right, so that no slots lie between a row's
                tokens, which a sliding window would count.

        Returns:
            Logits, fp32 [batch, keep, vocab], undefined at slots where a row has no token.
        """
        width = max(map(len, rows))
        tokens = torch.tensor(_padded(rows, width, right=last), dtype=torch.int64, device=self._model.device)
        counts = torch.tensor([len(row) for row in rows], device=tokens.device)
        slots = torch.arange(width, device=tokens.device)
        valid = slots < counts[:, None] if last else slots >= width - counts[:, None]
        counted = valid
        if self._without_positions is not None:
            marks = None if pauses is None else _padded(pauses, width, right=last)
            counted = valid & ~self._pauses(tokens, marks)
        positions = (self.lengths[:, None] + counted.cumsum(1) - 1).clamp_(min=0)
        self._valid = torch.cat([self._valid, valid], dim=1)
        self._counted = self._valid if counted is valid else torch.cat([self._counted, counted], dim=1)
        output = self._model(
            input_ids=tokens,
            attention_mask=self._prefix_mask(valid) if bidirectional else self._mask(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            **{CACHE: self._cache},
        )
        self.lengths += counted.sum(1)
        self.forward_passes += 1
        self.positions += int(counts.sum())
        return output.logits.float()

    def invalidate(self, row: int, count: int) -> None:
        """Mask out the last `count` valid slots of a row, as if they had never been computed."""
        if count:
            slots = self._valid[row].nonzero()[-count:, 0]
            self.lengths[row] -= self._counted[row, slots].sum()
            self._valid[row, slots] = False

    def select_rows(self, rows: Sequence[int]) -> None:
        """Reindex the batch: row i continues from what was row `rows[i]`. A row may be selected several times."""
        if list(rows) != list(range(len(self.lengths))):
            index = torch.tensor(rows, device=self._model.device)
            self._cache.batch_select_indices(index)
            self._valid, self._counted = self._valid[index], self._counted[index]
            self.lengths = self.lengths[index]

    def synchronize(self) -> None:
        """Wait for the work queued on the device, so that time can be measured."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def _pauses(self, tokens: Tensor, marks: list[list[int]] | None) -> Tensor:
        """Return which slots hold pauses without a position, bool [batch, width]."""
        ids = self._without_positions or range(0)
        found = (tokens >= ids.start) & (tokens < ids.stop)
        if marks is None:
            return found
        return found | torch.tensor(marks, dtype=torch.bool, device=tokens.device)

    def _mask(self) -> Tensor | None:
        """[batch, slots], or None where all slots are valid: the model then takes its fastest path."""
        return None if self._valid.all() else self._valid.long()

    def _prefix_mask(self, valid: Tensor) -> Tensor:
        """Return the additive mask [batch, 1, slots, slots] in which every valid slot attends to every valid slot.

        Invalid slots attend to themselves, so that no softmax is over an empty set.
        """
        implementation = self._model.config._attn_implementation
        if implementation not in _EXACT:
            raise ConfigError(
                "prefix_attention=bidirectional: expected a model loaded with attn_implementation='sdpa' or 'eager', "
                f"got {implementation!r}"
            )
        attended = (valid[:, None, :] & valid[:, :, None]) | torch.eye(
            valid.shape[1], dtype=torch.bool, device=valid.device
        )
        mask = torch.zeros(attended.shape, dtype=self._model.dtype, device=valid.device)
        return mask.masked_fill_(~attended, torch.finfo(self._model.dtype).min)[:, None]


def _padded(rows: Sequence[Sequence[int]], width: int, *, right: bool) -> list[list[int]]:
    gaps = [[0] * (width - len(row)) for row in rows]
    return [[*row, *gap] if right else [*gap, *row] for row, gap in zip(rows, gaps, strict=True)]
