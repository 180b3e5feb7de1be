"""Mean token losses over micro-batches and ranks, split into targets directly after a pause and the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.model import Hints, LMLoss
from pause_megatron.model.variable_length import PackedSegments
from pause_megatron.objective import LossPlan


@dataclass(frozen=True)
class Losses:
    """Mean token losses in nats, over supervised targets.

    Attributes:
        mean: Mean over all targets; nan where there are none.
        after_pause: Mean over targets directly after a pause, which are predicted from it; None: there are none.
        elsewhere: Mean over the other targets; None: there are none. A model that uses its pauses predicts worse
            elsewhere than after them.
        targets: Number of targets.
        after_pause_targets: Number of targets directly after a pause.
        by_corpus: Mean over the targets of each corpus of a blend, by name; None for one without targets. Empty for
            one corpus.
        hints: Mean over the targets of pauses or auxiliary heads, which the other means exclude; None: there are none.
        hint_targets: Number of these targets.
        objective: Mean of the objective that is minimized, hints excluded; None: it is `mean`, or all weights are 0.
        means: Further means that the objective logs, by name; None for one without values.
        rows: Rows of the head without those of hints, one or more a target.
    """

    mean: float
    after_pause: float | None
    elsewhere: float | None
    targets: int
    after_pause_targets: int
    by_corpus: dict[str, float | None] = field(default_factory=dict)
    hints: float | None = None
    hint_targets: int = 0
    objective: float | None = None
    means: dict[str, float | None] = field(default_factory=dict)
    rows: int = 0

    @property
    def head_rows(self) -> int:
        """Rows of the LM head in all, those of hints included."""
        return (self.rows or self.targets) + self.hint_targets

    @property
    def is_weightless(self) -> bool:
        """Whether there are targets, but the objective gives all of them weight 0, so that it has no value."""
        return self.rows > 0 and self.objective is None

    def of_objective(self) -> dict[str, float | None]:
        """Return the values that the objective logs, by their names; none for the mean cross-entropy."""
        if not self.rows:
            return {}
        return {"objective": self.objective, **{f"objective/{name}": mean for name, mean in self.means.items()}}

    @classmethod
    def from_sums(
        cls,
        total: float,
        after_pause: float,
        targets: float,
        after_pause_targets: float,
        by_corpus: dict[str, tuple[float, float]] | None = None,
        hints: tuple[float, float] = (0.0, 0.0),
    ) -> Losses:
        """Return the means of sums.

        Args:
            total: Sum of all token losses.
            after_pause: Sum of the losses of targets directly after a pause.
            targets: Number of targets.
            after_pause_targets: Number of targets directly after a pause.
            by_corpus: (sum, number of targets) of each corpus, by name.
            hints: (sum, number of targets) of the hints.
        """
        others, mean = targets - after_pause_targets, _mean(total, targets)
        return cls(
            mean=math.nan if mean is None else mean,
            after_pause=_mean(after_pause, after_pause_targets),
            elsewhere=_mean(total - after_pause, others),
            targets=int(targets),
            after_pause_targets=int(after_pause_targets),
            by_corpus={name: _mean(*sums) for name, sums in (by_corpus or {}).items()},
            hints=_mean(*hints),
            hint_targets=int(hints[1]),
        )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def lm_loss(module: nn.Module, batch: MicroBatch, scale: Tensor | float, hint_weight: float = 1.0) -> LMLoss:
    """Run the forward pass of a micro-batch.

    Args:
        module: A `PauseGPTModel`, or DeepSpeed's wrapper of one.
        batch: The micro-batch, on the model's device.
        scale: Factor of the differentiable loss: loss = scale x (sum of the token losses, or of
            the objective's terms + weighted sum of the hints').
        hint_weight: Weight of a hint.
    """
    spans = None
    if batch.segments is not None:
        spans = PackedSegments.of(batch.segments, batch.prefix, device=batch.tokens.device)
    hints = None
    if batch.hint_rows is not None and batch.hint_targets is not None:
        hints = Hints(batch.hint_rows, batch.hint_targets, batch.hints_by_head, hint_weight)
    output: LMLoss = module(
        batch.tokens,
        batch.position_ids,
        attention_mask=spans,
        target_rows=batch.target_rows,
        targets=batch.targets,
        loss_scale=scale,
        hints=hints,
        **({} if batch.steps is None else {"steps": batch.steps}),
    )
    return output


class LossSums:
    """Sums of the token losses of this rank. They stay on the device until they are read.

    Args:
        device: Device of the token losses.
        corpora: Names of the corpora of a blend, in the order of their dataset_id; empty for one corpus.
        hint_weight: Weight of a hint in the loss that is differentiated.
        plan: What is minimized; None: the mean cross-entropy of the targets.
    """

    def __init__(
        self,
        device: torch.device,
        corpora: Sequence[str] = (),
        hint_weight: float = 1.0,
        plan: LossPlan | None = None,
    ) -> None:
        self._names = None if plan is None else plan.objective.names
        self._corpora, self._hint_weight = corpora, hint_weight
        self._hints = torch.zeros(2, dtype=torch.float64, device=device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._of_corpora = torch.zeros(len(corpora), 2, dtype=torch.float64, device=device)
        # Sum and weights of the objective and of its means; then rows.
        of_objective = 0 if self._names is None else 2 * len(self._names) + 3
        self._of_objective = torch.zeros(of_objective, dtype=torch.float64, device=device)

    def forward(self, module: nn.Module, batch: MicroBatch, scale: Tensor) -> Tensor:
        """Return the scaled loss of a micro-batch, for `Engine.train_step`, and add its token losses to the sums.

        Args:
            module: As in `lm_loss`.
            batch: As in `lm_loss`.
            scale: As in `lm_loss`; a scalar on the device.
        """
        output = lm_loss(module, batch, scale, self._hint_weight)
        self.add_output(output, batch)
        return output.loss

    def add_output(self, output: LMLoss, batch: MicroBatch) -> None:
        """Add the token losses of a micro-batch, and those of its hints, to the sums.

        Args:
            output: What `lm_loss` returned.
            batch: The micro-batch.
        """
        self.add(output.token_losses, batch.after_pause, batch.target_datasets)
        if output.terms is not None and output.means is not None and batch.steps is not None:
            of_data = [batch.steps.weight_sum, batch.steps.rows.shape[0]]
            weight, rows = (torch.full_like(output.terms, value) for value in of_data)
            self._of_objective += torch.cat([torch.stack([output.terms, weight]), output.means.flatten(), rows[None]])
        if output.hint_losses is not None:
            losses = output.hint_losses.double()
            self._hints += torch.stack([losses.sum(), losses.new_full((), losses.numel())])

    def add(self, token_losses: Tensor, after_pause: Tensor, datasets: Tensor | None = None) -> None:
        """Add token losses to the sums.

        Args:
            token_losses: fp32 [targets].
            after_pause: bool [targets]; True where the target is predicted from a pause.
            datasets: int64 [targets], index of the target's corpus in the blend; None for one corpus.
        """
        losses = token_losses.double()
        count = losses.new_full((), losses.numel())  # a kernel, where new_tensor would be a copy that waits
        self._sums += torch.stack([losses.sum(), (losses * after_pause).sum(), count, after_pause.sum().double()])
        if self._corpora and datasets is not None:
            # Not index_add: its order of summation on a GPU is not deterministic.
            selected = datasets == torch.arange(len(self._corpora), device=datasets.device)[:, None]
            self._of_corpora += torch.stack([(selected * losses).sum(1), selected.sum(1).double()], dim=1)

    def reduced(self, context: ParallelContext) -> Tensor:
        """Return the sums over all ranks, float64 [n] on the device, for `means`. Every rank calls this.

        Args:
            context: Process groups of this rank.
        """
        sums = torch.cat([self._sums, self._hints, self._of_corpora.flatten(), self._of_objective])
        if context.world_size > 1:
            dist.all_reduce(sums, group=context.dp_group)
        return sums

    def means(self, sums: Sequence[float]) -> Losses:
        """Return the means of the sums that `reduced` gave, read by the host."""
        total, after_pause, targets, after_pause_targets, hints, hint_targets = sums[:6]
        end = 6 + 2 * len(self._corpora)
        by_corpus = dict(zip(self._corpora, zip(sums[6:end:2], sums[7:end:2], strict=True), strict=True))
        losses = Losses.from_sums(
            total, after_pause, targets, after_pause_targets, by_corpus, hints=(hints, hint_targets)
        )
        if self._names is None:
            return losses
        objective, *means = (_mean(*pair) for pair in zip(sums[end:-1:2], sums[end + 1 : -1 : 2], strict=True))
        by_name = dict(zip(self._names, means, strict=True))
        return replace(losses, objective=objective, means=by_name, rows=int(sums[-1]))

    def totals(self, context: ParallelContext) -> Losses:
        """Return the means over all ranks. Every rank calls this; the host waits for the device.

        Args:
            context: Process groups of this rank.
        """
        return self.means(self.reduced(context).tolist())
