"""From section `objective` to what a run minimizes: the objective and the weights of its targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pause_megatron.config.pauses import OBJECTIVES
from pause_megatron.config.schema import ObjectiveSection
from pause_megatron.config.user_code import calling, check_arguments, import_for_key
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.objective.catch_your_breath import CybAnytime, CybBudget, CybVariational
from pause_megatron.objective.checked import Checked
from pause_megatron.objective.protocol import Objective
from pause_megatron.objective.shipped import Anytime, CrossEntropy, WithZLoss
from pause_megatron.objective.steps import Steps, collect, steps_of

SIDE = "side"
"""Value of `objective.token_weights` for the weights of a side array."""

TokenWeights = Callable[[np.ndarray], np.ndarray]
"""Target ids, int64 [targets] -> their weights [targets], finite and not negative."""

SHIPPED: dict[str, Callable[[ObjectiveSection], Objective]] = {
    "cross_entropy": CrossEntropy,
    "anytime": Anytime,
    "cyb_anytime": CybAnytime,
    "cyb_variational": CybVariational,
    "cyb_budget": CybBudget,
}


@dataclass(frozen=True)
class LossPlan:
    """What a run minimizes, where it is not the mean cross-entropy of its targets.

    Attributes:
        objective: The objective.
        token_weights: Weights of the targets: SIDE, a function of their ids, or None.
        name: `objective.token_weights`, for messages.
    """

    objective: Objective
    token_weights: str | TokenWeights | None = None
    name: str = ""

    def steps(
        self,
        *,
        is_pause: Tensor,
        segments: Tensor | None,
        target_rows: Tensor,
        targets: Tensor,
        side: Tensor | None,
        sample_ids: Sequence[int],
    ) -> Steps:
        """Return the rows and weights of a micro-batch, on the host.

        Args:
            is_pause: Pauses among the input tokens, bool [batch, seq].
            segments: As in `MicroBatch`, also where it leaves them out.
            target_rows: As in `MicroBatch`.
            targets: As in `MicroBatch`.
            side: Weight of the target at each row of the flattening, fp32 [seq * batch]; None: the samples have none.
            sample_ids: Sample numbers, for messages.

        Raises:
            ConfigError: The function of `objective.token_weights` returns an array of another shape.
            DataError: A weight is negative or not finite. The message names the sample.
        """
        objective = self.objective
        rows, sizes = collect(is_pause, segments, target_rows, runs=objective.runs)
        weight = self._weights(target_rows, targets, side, sample_ids)
        number, index = steps_of(sizes)
        weights = objective.weights(index, sizes[number], weight[number])
        ends = sizes.cumsum(0).numpy()
        kinds = is_pause.t().reshape(-1)[rows]
        return Steps(rows, sizes, kinds, weights.float(), ends, float(weights.double().sum()))

    def _weights(self, target_rows: Tensor, targets: Tensor, side: Tensor | None, sample_ids: Sequence[int]) -> Tensor:
        """Return the checked weight of each target, fp32 [targets]."""
        if self.token_weights is None or not targets.numel():
            return torch.ones(targets.shape[0])
        if callable(self.token_weights):
            with calling(f"objective.token_weights={self.name}"):
                found = np.asarray(self.token_weights(targets.numpy().copy()))  # which it may change
            if found.shape != tuple(targets.shape) or found.dtype.kind not in "fiub":
                raise ConfigError(
                    f"objective.token_weights={self.name}: expected a number for each of {targets.shape[0]} targets, "
                    f"got {found.dtype} of shape {found.shape}"
                )
            weights = torch.from_numpy(found.astype(np.float32))
        elif side is None:
            raise ConfigError("objective.token_weights=side: expected samples with weights of data.side, got none")
        else:
            weights = side[target_rows].float()
        wrong = ~((weights >= 0) & weights.isfinite())
        if wrong.any():
            first = int(wrong.nonzero()[0])
            position, sample = divmod(int(target_rows[first]), len(sample_ids))
            raise DataError(
                f"sample {sample_ids[sample]}, position {position}: expected a weight of 0 or more for its target "
                f"{int(targets[first])} (objective.token_weights={self.name}), got {float(weights[first])}"
            )
        return weights


def loss_plan(section: ObjectiveSection) -> LossPlan | None:
    """Return what a run minimizes; None where it is the default, the mean cross-entropy of the targets.

    Args:
        section: Section `objective`.

    Raises:
        ConfigError: There is no such objective or function, or it is not one.
    """
    if section.name == OBJECTIVES[0] and not section.z_loss and section.token_weights is None:
        return None
    objective = resolve_objective(section)
    if section.z_loss:
        if "z_loss" in objective.names:
            raise ConfigError(
                f"objective.z_loss={section.z_loss:g}: expected an objective without a mean named z_loss, which is "
                f"then logged, got names {objective.names} of objective.name={section.name}"
            )
        objective = WithZLoss(objective, section.z_loss)
    name = section.token_weights
    if name is None or name == SIDE:
        return LossPlan(objective, name, name or "")
    function = import_for_key("objective.token_weights", name, f"{SIDE} or 'module:attribute'")
    if not callable(function):
        raise ConfigError(f"objective.token_weights: expected a function, got a {type(function).__name__} in {name}")
    check_arguments(f"objective.token_weights={name}", function, "ids")
    return LossPlan(objective, function, name)


def resolve_objective(section: ObjectiveSection) -> Objective:
    """Return an objective by its name, or by 'module:attribute'.

    Args:
        section: Section `objective`.

    Raises:
        ConfigError: There is no such objective, module or attribute, or it is no `Objective`, or it cannot be made.
    """
    if section.name in SHIPPED:
        return SHIPPED[section.name](section)
    place = f"objective.name={section.name}"
    found = import_for_key("objective.name", section.name, f"one of {', '.join(OBJECTIVES)}, or 'module:attribute'")
    if isinstance(found, type) or (callable(found) and not isinstance(found, Objective)):
        check_arguments(place, found, "section")
        with calling(place):
            found = found(section)
    missing = [name for name in ("runs", "names", "weights", "terms") if not hasattr(found, name)]
    if missing:
        raise ConfigError(
            f"objective.name: expected an objective, or a class or function that makes one, in {section.name!r}, got a "
            f"{type(found).__name__} without {', '.join(missing)}"
        )
    check_arguments(f"{place}: weights", found.weights, "index", "length", "weight")
    check_arguments(f"{place}: terms", found.terms, "chunk")
    return Checked(found, section.name)
