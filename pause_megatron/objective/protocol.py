"""What an objective is: which rows it needs, their weights, and the terms that it computes from a chunk of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from pause_megatron.objective.chunk import Chunk


class Terms(NamedTuple):
    """What an objective returns for a chunk.

    Attributes:
        values: Terms, each times its weight, fp32 of any shape. Their sum over the global batch, divided by the sum of
            the weights of all rows, is minimized.
        token_losses: Cross-entropy of each target at the last step of its run, fp32 [targets], for the logs.
        means: For the logs, by name: values and their weights (or bool), of one shape. The names are those of
            `Objective.names`; one that is left out has no values in this chunk.
    """

    values: Tensor
    token_losses: Tensor
    means: Mapping[str, tuple[Tensor, Tensor]] = {}


@runtime_checkable
class Objective(Protocol):
    """An objective. It has no parameters and no state: the loader's thread and the model have an instance each.

    `objective.name=module:attribute` names an instance, or a class or function that makes one of the section
    `objective`. Its value is (sum of all terms) / (sum of all row weights), both over the global batch. So a term must
    depend on its own target only, and the weights on the data only.

    Attributes:
        runs: Whether it needs all steps of each target's run of pauses; False: the last step only, the row that
            predicts the target in ordinary training.
        names: Names of the means that it logs.
    """

    runs: bool
    names: tuple[str, ...]

    def weights(self, index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        """Return the weight of each row of a micro-batch. Called on the host, before any forward pass.

        Args:
            index: Step of the row in its run, int64 [rows]: 0 is the text token before the run, s is its pause s. A run
                that nothing precedes (a window or example that begins with pauses) starts at its first pause.
            length: Number of rows of the run, int64 [rows]; the last has index length - 1.
            weight: Weight of the row's target (`objective.token_weights`), fp32 [rows].

        Returns:
            fp32 [rows], none negative.
        """
        ...

    def terms(self, chunk: Chunk) -> Terms:
        """Return the terms of a chunk of rows, differentiable by autograd in what the chunk gives.

        Args:
            chunk: Rows of whole runs, their logits and hidden states.
        """
        ...
