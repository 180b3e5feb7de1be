"""The choice of a token. Randomness is addressed: a draw depends on (seed, row, position) and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pause_megatron.errors import ConfigError
from pause_megatron.seeds import torch_seed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0: the likeliest token (greedy); else logits are divided by it.
        top_k: only the k likeliest tokens; 0: all. Tokens as likely as the k-th are kept too.
        top_p: only the fewest tokens whose probabilities (after temperature and top_k) sum to at least this; 1: all.
        seed: of the draws.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 or more, came {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected 0 (all) or more, came {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected more than 0 and at most 1, came {self.top_p}")

    def choose(self, logits: Tensor, rows: Sequence[int], position: int) -> list[int]:
        """The next token of every row.

        Args:
            logits: fp32 [rows, vocab]; -inf for tokens that must not come.
            rows: numbers of the prompts. A prompt keeps its number in whatever batch it stands.
            position: number of the new token, from 0.
        """
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        return [self._draw(of_row, row, position) for of_row, row in zip(logits, rows, strict=True)]

    def _draw(self, logits: Tensor, row: int, position: int) -> int:
        logits = self._keep(logits / self.temperature)
        # The Gumbel-max trick: argmax(logits - log E), E exponential, is a draw from softmax(logits). A difference of
        # rounding between batches changes it only where two perturbed logits all but coincide.
        noise = torch.empty(logits.shape).exponential_(generator=_generator(self.seed, row, position)).log_()
        return int((logits - noise.to(logits.device)).argmax())

    def _keep(self, logits: Tensor) -> Tensor:
        if 0 < self.top_k < logits.numel():
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # A token is left out if those before it already reach top_p; the first one never is.
            left_out = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(left_out).scatter(0, order, left_out), float("-inf"))
        return logits


def _generator(seed: int, row: int, position: int) -> torch.Generator:
    """On the host, whatever the device: a draw is the same on a CPU and on a GPU."""
    return torch.Generator().manual_seed(torch_seed(seed, row, position))
