"""Supervision of a window with pauses: its labels and its loss mask, in which a pause is never a target. Pure numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pause_megatron.data.windows.pause import Window


class Targets(NamedTuple):
    """What a window of N + 1 tokens teaches at each of its N input positions.

    Attributes:
        labels: The next token, int64 [N]; 0 where it is a pause.
        loss_mask: 1 where the next token is a target, else 0, float32 [N].
    """

    labels: np.ndarray
    loss_mask: np.ndarray


def supervise(window: Window, begins: np.ndarray | None = None) -> Targets:
    """Return the targets of a window: each of its text tokens but the first.

    A pause gets label 0 and loss mask 0, as GPTDataset does for padding: the mask alone makes the loss right, and no
    label is a pause id.

    Args:
        window: A window of N + 1 tokens, the last of which is only a target.
        begins: Where documents begin, bool [N + 1], if their first tokens are not to be targets (`eod_mask_loss`).
            None: they are targets.

    Returns:
        New arrays, which the caller may change.
    """
    before_pause = window.places - 1
    labels = window.tokens[1:].copy()
    labels[before_pause] = 0
    loss_mask = np.empty(labels.size, dtype=np.float32)
    loss_mask.fill(1)  # np.ones takes 1 us more
    loss_mask[before_pause] = 0
    if begins is not None:
        loss_mask[begins[1:]] = 0
    return Targets(labels, loss_mask)
