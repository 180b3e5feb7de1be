"""One optimizer step over a global batch, on DeepSpeed's own engine."""

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
    """What an optimizer step did.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping; not finite when the step was skipped
        applied: False when the norm was not finite: parameters and optimizer state are as before, on every rank
        read: the numbers that `train_step` was asked to read
    """

    grad_norm: float
    applied: bool
    read: list[float] = field(default_factory=list)


class Engine:
    """A module under `deepspeed.initialize`, with torch's AdamW.

    Args:
        model: any module; moved to the device and cast by DeepSpeed
        groups: optimizer parameter groups (`params`, `weight_decay`)
        ds_config: the complete DeepSpeed dict (`pause_megatron.config.deepspeed`)
        optim: betas and epsilon of AdamW
        mpu: the model-parallel unit that tells DeepSpeed its groups
        dp_rank, dp_size: place in the data-parallel group
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Sequence[dict],
        ds_config: dict,
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
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use, whatever its log level
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
        self.state = OptimizerState(self.deepspeed, dp_rank, dp_size)
        self._update = update_of(self.deepspeed, optimizer, bound)
        self._dp_size = dp_size

    def close(self) -> None:
        """Lets go of the parameters' hooks, which else keep the model and its process groups alive for good."""
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
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        The gradient is that of (sum of token losses over the global batch) / (targets in the global batch), however
        the targets are spread over ranks and micro-batches: `forward` must return a scalar that is its `scale`
        argument times the sum of its micro-batch's token losses.

        The host waits for the device once, between the last backward pass and the optimizer step: it must know that
        the gradient is finite. (What DeepSpeed waits for besides: `pause_megatron.engine.updates`.)

        Args:
            micro_batches: this rank's share of the global batch; the same number on every rank
            forward: (module, micro-batch, scale) -> scalar loss tensor; scale is a scalar fp32 on the device
            lr: learning rate of this step
            global_targets: supervised targets over all ranks and micro-batches, on the host or a scalar on the device;
                0 gives a zero gradient
            read: -> numbers on the device [n], that the host wants to know; asked for behind the last backward pass,
                and read together with the norm
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
        """What token losses are multiplied with, scalar fp32 on the device.

        DeepSpeed averages over the data-parallel group and over the micro-batches; we want the sum over both. (Its
        scale_wrt_gas=False does not do: where the module returns the loss itself, it divides all the same.)
        """
        if isinstance(global_targets, Tensor):
            targets = global_targets.double().clamp(min=1)
        else:
            targets = torch.full((), max(global_targets, 1), dtype=torch.float64, device=self.deepspeed.device)
        return (self._dp_size * micro_batches / targets).float()

    def _optimizer_step(self, read: Callable[[], Tensor] | None) -> StepOutcome:
        wanted = [] if read is None else [read().double()]
        norm = self._update.norm()
        if norm is not None:
            norm, *values = torch.cat([norm.double().reshape(1), *wanted]).tolist()
            return StepOutcome(norm, self._update.apply(norm), values)
        applied = self._update.apply(math.nan)
        norm = self.deepspeed.get_global_grad_norm()
        return StepOutcome(
            math.nan if norm is None else float(norm), applied, torch.cat(wanted).tolist() if wanted else []
        )
