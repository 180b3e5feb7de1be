"""Pause policies: a fixed number of pauses, or adaptive pauses until the next-token distribution has settled.

The model predicts the first token of its answer from the last pause, so every pause yields a next-token distribution. A
policy sees these distributions, one for each number of pauses, and decides when further pauses are not worth computing.
Pauses are computed in blocks, since a block costs about as much as one pause. Where a policy stops does not depend on
the block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pause_megatron.errors import ConfigError


@runtime_checkable
class PausePolicy(Protocol):
    """Policy that decides how many pauses one prompt gets. Any object with these members is a policy."""

    @property
    def first(self) -> int:
        """Minimum number of pauses; at least this many are computed together with the prompt."""
        ...

    @property
    def block(self) -> int:
        """Pauses computed in each further forward pass, 1 or more."""
        ...

    @property
    def limit(self) -> int:
        """Maximum number of pauses, `first` or more."""
        ...

    def stop(self, log_probabilities: Tensor) -> int | None:
        """Decide where to stop, if anywhere. It is not called where `first` equals `limit`.

        Args:
            log_probabilities: Log-probabilities of the next token after `first`, `first` + 1, ... pauses, as many as
                have been computed so far for this prompt, fp32 [n, vocab], n >= 2. Pause ids have probability 0.

        Returns:
            An index i in 0..n-1 to generate the answer after `first` + i pauses; None to continue up to the limit.
        """
        ...


@dataclass(frozen=True)
class FixedPauses:
    """Always M pauses, all in the prefill.

    Attributes:
        count: Number of pauses, M.
        block: Unused; part of the protocol.

    Raises:
        ConfigError: A count below 0.
    """

    count: int
    block: int = 1

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"pauses: expected 0 or more, got {self.count}")

    @property
    def first(self) -> int:
        """M, since all of them are computed with the prompt."""
        return self.count

    @property
    def limit(self) -> int:
        """M."""
        return self.count

    def stop(self, log_probabilities: Tensor) -> int | None:
        """Return None: never stop before the limit."""
        return None


@dataclass(frozen=True)
class SettledPauses:
    """Pauses until the next-token distribution has settled.

    It has settled after i pauses if each of the last `patience` pauses changed it by at most `change`, or if its
    entropy is at most `entropy`: a model that is certain of its next token does not need more pauses. Change is the
    total variation distance, 0..1: the largest difference in probability of any set of tokens.

    Attributes:
        change: Threshold on the change, 0..1; None to ignore the change.
        entropy: Threshold on the entropy, in nats; None to ignore the entropy.
        patience: Number of consecutive pauses that must change the distribution little.
        first: Minimum number of pauses.
        block: Pauses computed in each forward pass.
        limit: Maximum number of pauses.

    Raises:
        ConfigError: A value out of its range, or no threshold at all.
    """

    change: float | None = 0.02
    entropy: float | None = None
    patience: int = 2
    first: int = 0
    block: int = 4
    limit: int = 50

    def __post_init__(self) -> None:
        if self.change is None and self.entropy is None:
            raise ConfigError("SettledPauses: expected a threshold, `change` or `entropy`, got neither")
        if self.change is not None and not 0 <= self.change <= 1:
            raise ConfigError(f"SettledPauses.change: expected 0..1, got {self.change}")
        if self.entropy is not None and self.entropy < 0:
            raise ConfigError(f"SettledPauses.entropy: expected 0 nats or more, got {self.entropy}")
        if self.patience < 1 or self.block < 1:
            raise ConfigError(
                f"SettledPauses: expected patience and block of 1 or more, got {self.patience} and {self.block}"
            )
        if not 0 <= self.first <= self.limit:
            raise ConfigError(
                f"SettledPauses: expected 0 <= first <= limit, got first {self.first} and limit {self.limit}"
            )

    def stop(self, log_probabilities: Tensor) -> int | None:
        """Return the first index at which the distribution has settled."""
        probabilities = log_probabilities.exp()
        settled = probabilities.new_zeros(len(probabilities), dtype=torch.bool)
        if self.change is not None and len(probabilities) > self.patience:
            changes = (probabilities[1:] - probabilities[:-1]).abs().sum(-1) / 2
            settled[self.patience :] = (changes <= self.change).unfold(0, self.patience, 1).all(-1)
        if self.entropy is not None:
            entropies = -(probabilities * log_probabilities.clamp(min=-1e4)).sum(-1)
            settled |= entropies <= self.entropy
        indices = settled.nonzero()
        return int(indices[0, 0]) if len(indices) else None
