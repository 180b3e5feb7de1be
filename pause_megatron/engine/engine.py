"""One optimizer step over a global batch, on DeepSpeed's own engine."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pause_megatron.config.schema import OptimSection
from pause_megatron.engine.clipping import Clipping, global_norm, norm_is_exact, reduced_gradients
from pause_megatron.engine.state import OptimizerState

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping; not finite when the step was skipped
        applied: False when the norm was not finite: parameters and optimizer state are as before, on every rank
    """

    grad_norm: float
    applied: bool


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
        self._clipping = None
        if not norm_is_exact(ds_config):
            self._clipping = Clipping(optimizer, ds_config["gradient_clipping"])
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use, whatever its log level
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
        self.state = OptimizerState(self.deepspeed, dp_rank, dp_size)
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
        forward: Callable[[nn.Module, MicroBatch, float], Tensor],
        *,
        lr: float,
        global_targets: int,
    ) -> StepOutcome:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        The gradient is that of (sum of token losses over the global batch) / (targets in the global batch), however
        the targets are spread over ranks and micro-batches: `forward` must return a scalar that is its `scale`
        argument times the sum of its micro-batch's token losses.

        Args:
            micro_batches: this rank's share of the global batch; the same number on every rank
            forward: (module, micro-batch, scale) -> scalar loss tensor
            lr: learning rate of this step
            global_targets: supervised targets over all ranks and micro-batches; 0 gives a zero gradient
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed averages over the data-parallel group and over the micro-batches; we want the sum over both.
        # (Its scale_wrt_gas=False does not do: where the module returns the loss itself, it divides all the same.)
        scale = self._dp_size * len(micro_batches) / max(global_targets, 1)
        last = len(micro_batches) - 1
        for index, micro_batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == last)
            loss = forward(self.deepspeed, micro_batch, scale)
            self.deepspeed.backward(loss)
            if index < last:
                self.deepspeed.step()
        return self._optimizer_step()

    def _optimizer_step(self) -> StepOutcome:
        norm = None
        if self._clipping is not None:
            group = self.deepspeed.mpu.get_tensor_model_parallel_group()
            norm = global_norm(reduced_gradients(self.deepspeed), group, self.deepspeed.device)
            self._clipping.clip(norm)
            # In fp32 without ZeRO DeepSpeed would apply it; its other optimizers look for themselves.
            if not (math.isfinite(norm) or self.deepspeed.bfloat16_enabled()):
                self.deepspeed.zero_grad()
                return StepOutcome(norm, applied=False)
        self.deepspeed.step()
        applied = bool(getattr(self.deepspeed, "_step_applied", True))
        if norm is None or not applied:
            norm = self.deepspeed.get_global_grad_norm()
        return StepOutcome(math.nan if norm is None else float(norm), applied=applied)
