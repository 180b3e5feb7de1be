"""The loss that skips pauses, on the logits of any PyTorch model, in Hugging Face's convention for labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pause_megatron.errors import ConfigError

IGNORED = -100
"""The label of a position that is no target, as torch's cross-entropy and transformers have it."""


class PauseLoss:
    """Sum token losses over every target that is text (Goyal et al., ICLR 2024, section 3.1).

    A plain loop takes `sum`; `Trainer(compute_loss_func=PauseLoss(...))` calls the object itself. The own loss of a
    transformers model is the same with softmax="keep" and a vocabulary without unused rows, if the labels are those of
    `pause_windows` or `PauseTransform`.

    Args:
        pause_ids: The K pause ids. Labels that are among them are ignored, so a batch's input_ids serve as labels too.
        softmax: "keep", or "exclude" the pause logits from the denominator.
        rows: Ids that the model has a use for, pauses included: rows of the matrices behind them are padding and take
            no part in the softmax. None: all of them do.

    Raises:
        ConfigError: softmax is neither, or rows that leave a pause out.
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
        """Add up the losses of a batch.

        Divide by the number of targets of the whole optimizer step, over micro-batches and ranks: these numbers differ,
        and a mean of means weights targets unequally.

        Args:
            logits: [batch, seq, rows], any floating type; the softmax is taken in fp32.
            labels: int64 [batch, seq], the token at each position, not shifted; -100 and pause ids are no targets.

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
        """Give Trainer its loss, scalar fp32: the sum over `num_items_in_batch`, the step's targets as Trainer counts
        them; over the targets of this batch where it does not say."""
        total, count = self.sum(outputs["logits"], labels)
        return total / (count if num_items_in_batch is None else num_items_in_batch)
