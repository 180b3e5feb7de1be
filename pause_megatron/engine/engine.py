"""The training engine: one optimizer step over a global batch, on `deepspeed.DeepSpeedEngine`."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pause_megatron.config.schema import OptimSection
from pause_megatron.engine.state import OptimizerState
from pause_megatron.engine.updates import deepspeed_clips, update_of
from pause_megatron.engine.waits import in_micro_batch

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of an optimizer step.

    Attributes:
        grad_norm: Global L2 norm of the gradient before clipping; not finite where the step was skipped.
        applied: Whether the step was applied. If not, parameters and optimizer state are as before, on every rank.
        read: The numbers that `train_step` was asked to read.
    """

    grad_norm: float
    applied: bool
    read: list[float] = field(default_factory=list)


class Engine:
    """A module under `deepspeed.initialize`, with torch's AdamW.

    Args:
        model: Any module; DeepSpeed moves it to the device and casts it.
        groups: Optimizer parameter groups (`params`, `weight_decay`).
        ds_config: The complete DeepSpeed configuration (`pause_megatron.config.deepspeed`).
        optim: Betas and epsilon of AdamW.
        mpu: Model-parallel unit with the process groups.
        dp_rank: Rank in the data-parallel group.
        dp_size: Data-parallel size.

    Attributes:
        deepspeed: The `deepspeed.DeepSpeedEngine`.
        state: Masters and moments of this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Sequence[dict[str, Any]],
        ds_config: dict[str, Any],
        optim: OptimSection,
        mpu: Any,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # The learning rate stays 0 until the first step: some of DeepSpeed's optimizers take a dummy step when built.
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups], lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        bound = ds_config["gradient_clipping"]
        if not deepspeed_clips(ds_config):
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use at any log level
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
        self.state = OptimizerState(self.deepspeed, dp_rank, dp_size)
        self._update = update_of(self.deepspeed, optimizer, bound)
        self._dp_size = dp_size

    def close(self) -> None:
        """Remove the hooks of the parameters, which would keep the model and its process groups alive."""
        self.deepspeed.destroy()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def module(self) -> nn.Module:
        """The model itself, outside DeepSpeed's wrapper."""
        return self.deepspeed.module

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        forward: Callable[[nn.Module, MicroBatch, Tensor], Tensor],
        *,
        lr: float,
        global_targets: int | Tensor,
        read: Callable[[], Tensor] | None = None,
    ) -> StepOutcome:
        """Run forward and backward over this rank's micro-batches, then one optimizer step.

        The gradient is that of (sum of token losses over the global batch) / (targets in the global batch), however
        the targets are distributed over ranks and micro-batches. For this, `forward` must return its `scale` argument
        times the sum of its micro-batch's token losses.

        The host synchronizes with the device once, between the last backward pass and the optimizer step, to know that
        the gradient is finite. DeepSpeed's own synchronizations are listed in `pause_megatron.engine.updates`.

        Args:
            micro_batches: This rank's share of the global batch; the same number on every rank.
            forward: (module, micro-batch, scale) -> scalar loss; scale is a scalar fp32 on the device.
            lr: Learning rate of this step.
            global_targets: Supervised targets over all ranks and micro-batches, or the sum of their weights; an integer
                or a scalar on the device. 0 gives a zero gradient, whatever the terms are.
            read: Returns further numbers [n] on the device for the host. It is called after the last backward pass,
                and its result is read together with the norm.

        Returns:
            The outcome, the same on every rank.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        scale = self._scale(global_targets, len(micro_batches))
        last = len(micro_batches) - 1
        with in_micro_batch():
            for index, micro_batch in enumerate(micro_batches):
                self.deepspeed.set_gradient_accumulation_boundary(index == last)
                loss = forward(self.deepspeed, micro_batch, scale)
                self.deepspeed.backward(loss)
                if index < last:
                    self.deepspeed.step()
        return self._optimizer_step(read)

    def _scale(self, global_targets: int | Tensor, micro_batches: int) -> Tensor:
        """Return the factor of the token losses, scalar fp32 on the device.

        DeepSpeed averages over the data-parallel group and over the micro-batches; the gradient must be the sum over
        both. (scale_wrt_gas=False has no effect where the module itself returns the loss.)
        """
        if isinstance(global_targets, Tensor):
            targets = global_targets.double()
        else:
            targets = torch.full((), global_targets, dtype=torch.float64, device=self.deepspeed.device)
        return (self._dp_size * micro_batches / targets).where(targets > 0, 0.0).float()

    def _optimizer_step(self, read: Callable[[], Tensor] | None) -> StepOutcome:
        numbers = [] if read is None else [read().double()]
        norm = self._update.norm()
        if norm is not None:
            norm, *values = torch.cat([norm.double().reshape(1), *numbers]).tolist()
            return StepOutcome(norm, self._update.apply(norm), values)
        applied = self._update.apply(math.nan)
        norm = self.deepspeed.get_global_grad_norm()
        return StepOutcome(
            math.nan if norm is None else float(norm), applied, torch.cat(numbers).tolist() if numbers else []
        )
