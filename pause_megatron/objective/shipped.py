"""Objectives that ship, but Catch Your Breath: cross-entropy, the loss after every pause, and the z-loss of any."""

from __future__ import annotations

from torch import Tensor

from pause_megatron.config.schema import ObjectiveSection
from pause_megatron.objective.chunk import Chunk
from pause_megatron.objective.protocol import Objective, Terms

LOGGED_STEPS = 4
"""Steps of a run whose mean cross-entropy is logged: 0, 1, 2, 3."""

STEP_NAMES = tuple(f"loss_step_{step}" for step in range(LOGGED_STEPS))


def at_last(index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
    """Return the weight of the target at the last row of each run, 0 at the others; as `Objective.weights`."""
    return weight * (index == length - 1)


def loss_by_step(chunk: Chunk, losses: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean cross-entropy at the first steps of runs, over the targets that have pauses before them.

    Args:
        chunk: A chunk of runs.
        losses: Cross-entropy at each row, [rows].
    """
    return {name: (losses, (chunk.index == step) & (chunk.length > 1)) for step, name in enumerate(STEP_NAMES)}


class CrossEntropy:
    """Weighted mean of the cross-entropies of the targets. Without weights it is what no objective computes, slower.

    Args:
        section: Not used.
    """

    runs: bool = False
    names: tuple[str, ...] = ()

    def __init__(self, section: ObjectiveSection) -> None:
        pass

    def weights(self, index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        """Return the weight of the target at the last step, 0 at the others."""
        return at_last(index, length, weight)

    def terms(self, chunk: Chunk) -> Terms:
        """Return weight x -log p(target)."""
        losses = -chunk.log_probability(chunk.targets)
        return Terms(chunk.weights * losses, losses)


class Anytime:
    """Cross-entropy after every pause of a run, on the same target.

    The weight of step s is discount ** s, times that of the target. With discount 1 all steps count alike. A target
    without pauses before it has one step, as in ordinary training.

    Args:
        section: Section `objective`, with the discount.
    """

    runs, names = True, STEP_NAMES

    def __init__(self, section: ObjectiveSection) -> None:
        self._discount = section.discount

    def weights(self, index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        """Return weight x discount ** index."""
        return weight * self._discount ** index.to(weight.dtype)

    def terms(self, chunk: Chunk) -> Terms:
        """Return weight x -log p(target) of each row."""
        losses = -chunk.log_probability(chunk.targets)
        return Terms(chunk.weights * losses, chunk.last(losses), loss_by_step(chunk, losses))


class WithZLoss:
    """An objective plus z_loss x the squared log-normalizer of the softmax, at each row with the row's weight.

    Args:
        objective: The objective.
        factor: `objective.z_loss`.
    """

    def __init__(self, objective: Objective, factor: float) -> None:
        self._objective, self._factor = objective, factor
        self.runs, self.names = objective.runs, (*objective.names, "z_loss")
        self.weights = objective.weights

    def terms(self, chunk: Chunk) -> Terms:
        """Return the terms of the objective, and those of the z-loss added to them."""
        terms = self._objective.terms(chunk)
        squares = chunk.log_normalizer().square()
        total = terms.values.sum() + self._factor * (chunk.weights * squares).sum()
        return Terms(total, terms.token_losses, {**terms.means, "z_loss": (squares, chunk.weights)})
