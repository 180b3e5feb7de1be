"""Token selection: greedy or sampled with temperature, top-k and top-p; each draw depends only on its address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pause_megatron.errors import ConfigError
from pause_megatron.seeds import torch_seed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is selected. A draw depends on (seed, row, position) and on nothing else.

    Where the model requests pauses, each selection after a request has a draw of its own, at the same position.

    Attributes:
        temperature: 0 selects the likeliest token (greedy); otherwise logits are divided by it.
        top_k: Sample from the k likeliest tokens only (ties with the k-th are kept); 0 for all.
        top_p: Sample from the fewest tokens whose probabilities, after temperature and top_k, sum to at least this;
            1 for all.
        seed: Seed of the draws.
        rows: Row number of each prompt, which addresses its draws; None for 0, 1, ... A prompt that keeps its number
            gets the same answer in any batch.

    Raises:
        ConfigError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")

    def row_numbers(self, prompts: int) -> Sequence[int]:
        """Return the row numbers of a batch.

        Args:
            prompts: Number of prompts in the batch.

        Raises:
            ConfigError: `rows` has another length.
        """
        rows = range(prompts) if self.rows is None else self.rows
        if len(rows) != prompts:
            raise ConfigError(f"rows: expected {prompts} numbers, one for each prompt, got {len(rows)}")
        return rows

    def select(self, logits: Tensor, position: int | Sequence[int], attempts: Sequence[int] | None = None) -> list[int]:
        """Select the next token of every row.

        Args:
            logits: Next-token logits, fp32 [batch, vocab]; -inf for tokens that must not be emitted.
            position: Number of the new token, from 0; or one number for each row.
            attempts: For each row, how often a token was selected at this position before, where a pause was requested.
                The first draw does not depend on it; None for 0.

        Returns:
            Token ids, [batch].
        """
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        rows = self.row_numbers(len(logits))
        positions = [position] * len(logits) if isinstance(position, int) else position
        addresses = zip(rows, positions, attempts or [0] * len(logits), strict=True)
        return [
            self._draw(row_logits, (row, number, attempt) if attempt else (row, number))
            for row_logits, (row, number, attempt) in zip(logits, addresses, strict=True)
        ]

    def _draw(self, logits: Tensor, address: tuple[int, ...]) -> int:
        logits = self._filter(logits / self.temperature)
        # The Gumbel-max trick: argmax(logits - log E), E exponential, is a draw from softmax(logits). A rounding
        # difference between batches changes it only where two perturbed logits nearly coincide.
        noise = torch.empty(logits.shape).exponential_(generator=_generator(self.seed, *address)).log_()
        return int((logits - noise.to(logits.device)).argmax())

    def _filter(self, logits: Tensor) -> Tensor:
        if 0 < self.top_k < logits.numel():
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # A token is removed if those before it already reach top_p; the first one never is.
            removed = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), float("-inf"))
        return logits


GREEDY = Sampling()


def _generator(*address: int) -> torch.Generator:
    """Seed a generator on the host, so that a draw is the same on a CPU and on a GPU."""
    return torch.Generator().manual_seed(torch_seed(*address))
