"""How many pauses a prompt gets: a fixed number, or until the next-token distribution has settled.

A model that reads its answer from the last pause says after every pause what it would answer now. A policy looks at
these distributions, one for each number of pauses, and says when further pauses are not worth computing. They are
computed in blocks, since a block costs about as much as a single one; where a policy stops does not depend on how the
pauses were cut into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pause_megatron.errors import ConfigError


@runtime_checkable
class PausePolicy(Protocol):
    """Decides how many pauses one prompt gets. Anything of this shape is a policy.

    Attributes:
        first: pauses that are always there; at least this many are computed together with the prompt.
        block: pauses computed in each further forward pass, 1 or more.
        limit: the most pauses a prompt may get; `first` or more.
    """

    first: int
    block: int
    limit: int

    def stop(self, log_probabilities: Tensor) -> int | None:
        """Say where to stop, if anywhere. Not asked if `first` is already the limit.

        Args:
            log_probabilities: fp32 [n, vocab], n >= 2. Of the next token after `first`, `first` + 1, ... pauses, all
                that have been computed so far for this prompt. Pause ids have probability 0.

        Returns:
            an index i in 0..n-1: the answer is read after `first` + i pauses. None: go on, up to the limit.
        """
        ...


@dataclass(frozen=True)
class FixedPauses:
    """Always M pauses, all in the prefill.

    Raises:
        ConfigError: fewer than 0.
    """

    count: int
    block: int = 1

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"pauses: expected 0 or more, came {self.count}")

    @property
    def first(self) -> int:
        """M: all of them come with the prompt."""
        return self.count

    @property
    def limit(self) -> int:
        """M."""
        return self.count

    def stop(self, log_probabilities: Tensor) -> int | None:
        """Never before the limit."""
        return None


@dataclass(frozen=True)
class SettledPauses:
    """Pauses until the next-token distribution has settled.

    It has settled after i pauses if each of the last `patience` pauses changed it by at most `change` (total variation
    distance, 0..1: the largest difference in probability that any set of tokens saw), or if its entropy is at most
    `entropy`: a model that is sure of its next token needs no more time to think about it.

    Attributes:
        change: threshold on the change, 0..1; None: do not look at it.
        entropy: threshold on the entropy, in nats; None: do not look at it.
        patience: pauses in a row that must change little.
        first: pauses that are always there.
        block: pauses computed in each forward pass.
        limit: hard cap.

    Raises:
        ConfigError: a value out of its range, or no threshold at all.
    """

    change: float | None = 0.02
    entropy: float | None = None
    patience: int = 2
    first: int = 0
    block: int = 4
    limit: int = 50

    def __post_init__(self) -> None:
        if self.change is None and self.entropy is None:
            raise ConfigError("SettledPauses: expected a threshold, `change` or `entropy`")
        if self.change is not None and not 0 <= self.change <= 1:
            raise ConfigError(f"SettledPauses.change: expected 0..1, came {self.change}")
        if self.entropy is not None and self.entropy < 0:
            raise ConfigError(f"SettledPauses.entropy: expected 0 nats or more, came {self.entropy}")
        if self.patience < 1 or self.block < 1:
            raise ConfigError(
                f"SettledPauses: expected patience and block of 1 or more, came {self.patience} and {self.block}"
            )
        if not 0 <= self.first <= self.limit:
            raise ConfigError(
                f"SettledPauses: expected 0 <= first <= limit, came first {self.first} and limit {self.limit}"
            )

    def stop(self, log_probabilities: Tensor) -> int | None:
        """The smallest number of pauses after which the distribution has settled."""
        probabilities = log_probabilities.exp()
        settled = probabilities.new_zeros(len(probabilities), dtype=bool)
        if self.change is not None and len(probabilities) > self.patience:
            changes = (probabilities[1:] - probabilities[:-1]).abs().sum(-1) / 2
            settled[self.patience :] = (changes <= self.change).unfold(0, self.patience, 1).all(-1)
        if self.entropy is not None:
            entropies = -(probabilities * log_probabilities.clamp(min=-1e4)).sum(-1)
            settled |= entropies <= self.entropy
        found = settled.nonzero()
        return int(found[0, 0]) if len(found) else None
