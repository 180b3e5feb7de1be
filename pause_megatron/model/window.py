"""Sliding windows of attention: token i attends to token j only if i - window < j."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class SlidingWindow:
    """The window of a model's layers, with the mask of those that need one: all of them share one tensor.

    Args:
        size: Tokens that a token attends to, itself included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._causal: Tensor | None = None

    def causal(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask of a causal window, [length, length]: 0, or -inf where a query must not attend.

        Args:
            length: Tokens of a sequence.
            dtype: Type of the queries.
            device: Device of the queries.
        """
        mask = self._causal
        if mask is None or mask.shape[0] < length or mask.dtype != dtype or mask.device != device:
            # A mask that is made while generating may be used by a backward pass later.
            with torch.inference_mode(False):
                attended = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
                hidden = ~attended | self._passed(length, device)
                mask = torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            self._causal = mask
        return mask[:length, :length]

    def within(self, mask: Tensor) -> Tensor:
        """Return a mask that also hides what the window has passed; computed once for all layers.

        Args:
            mask: [..., seq, seq], bool (True where a query must not attend) or additive.
        """
        tagged: Any = mask
        narrowed = getattr(tagged, "within_window", None)
        if narrowed is None or narrowed[0] != (self.size, mask._version):
            hidden = self._passed(mask.shape[-1], mask.device)
            value = mask.masked_fill(hidden, True if mask.dtype == torch.bool else -math.inf)
            narrowed = tagged.within_window = ((self.size, mask._version), value)
        return narrowed[1]

    def _passed(self, length: int, device: torch.device) -> Tensor:
        """Return where j <= i - window, bool [length, length]."""
        return torch.ones(length, length, dtype=torch.bool, device=device).tril_(-self.size)
