"""Pause-aware cross-entropy on the logits of any PyTorch model, with labels in Hugging Face's convention."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pause_megatron.errors import ConfigError

IGNORED = -100
"""The label of a position without a target, the ignore_index of torch and transformers."""


class PauseLoss:
    """Cross-entropy over text targets, which ignores pauses (Goyal et al., ICLR 2024, section 3.1).

    A training loop calls `sum`; `Trainer(compute_loss_func=PauseLoss(...))` calls the object itself. The built-in loss
    of a transformers model is the same with softmax="keep" and no padded vocabulary rows, if the labels are those of
    `pause_windows` or `PauseTransform`.

    Args:
        pause_ids: The K pause ids. Labels among them are ignored, so input_ids can serve as labels.
        softmax: "keep" or "exclude" the pause logits in the softmax.
        rows: Number of vocabulary rows in use, pauses included; later rows are padding and take no part in the softmax.
            None for all rows.

    Raises:
        ConfigError: Another value of softmax, or rows that do not include the pauses.
    """

    def __init__(
        self, pause_ids: range, *, softmax: Literal["keep", "exclude"] = "keep", rows: int | None = None
    ) -> None:
        if softmax not in ("keep", "exclude"):
            raise ConfigError(f"softmax: expected 'keep' or 'exclude', got {softmax!r}")
        if rows is not None and rows < pause_ids.stop:
            raise ConfigError(f"rows: expected {pause_ids.stop} or more, so that the pauses are among them, got {rows}")
        self.pause_ids, self.softmax, self.rows = pause_ids, softmax, rows

    def sum(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the losses of a batch.

        Divide by the number of targets of the whole optimizer step, over micro-batches and ranks. These numbers differ,
        and a mean of means would weight targets unequally.

        Args:
            logits: Logits of any floating type, [batch, seq, rows]; the softmax is computed in fp32.
            labels: Token at each position, not shifted, int64 [batch, seq]; -100 and pause ids are ignored.

        Returns:
            The sum in nats, scalar fp32, and the number of targets, scalar int64.
        """
        is_pause = (labels >= self.pause_ids.start) & (labels < self.pause_ids.stop)
        targets = labels.masked_fill(is_pause, IGNORED)[:, 1:].flatten()
        logits = logits[:, :-1].flatten(0, 1).float()[:, : self.rows]
        if self.softmax == "exclude":
            is_pause_row = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            is_pause_row[self.pause_ids.start : self.pause_ids.stop] = True
            logits = logits.masked_fill(is_pause_row, float("-inf"))
        total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total, (targets != IGNORED).sum()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss for `Trainer`, scalar fp32.

        Args:
            outputs: The model's output, with "logits".
            labels: As for `sum`.
            num_items_in_batch: Number of targets of the optimizer step, as `Trainer` counts them; None for the number
                of targets of this batch.
        """
        total, count = self.sum(outputs["logits"], labels)
        return total / (count if num_items_in_batch is None else num_items_in_batch)
