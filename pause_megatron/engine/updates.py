"""How an optimizer step of DeepSpeed's is taken once the gradient's norm is known on the host.

DeepSpeed's optimizers take the norm within their step and wait for it several times: for each parameter (bf16 without
ZeRO), for each group of parameters (stages 1 to 3), or once more than needed. Here the norm is taken before the step,
read by the host together with everything else of the step, and handed over as a number on the host; the step then
only enqueues work. What DeepSpeed 0.19.8 still waits for on a GPU:

  stages 0, 1, 2              nothing (stage 2 with overlap_comm: the device, once a bucket and once a micro-batch)
  stage 3                     its reduction stream, once a micro-batch; the device, once a step; events of gathers and
                              reductions that lie some way back
  a CPU-offloaded optimizer   its own norm, once a group of parameters, and the copies to and from the host
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor

from pause_megatron.engine.clipping import Clipping, Gradients, global_norm


class Update(Protocol):
    """One kind of DeepSpeed optimizer."""

    def norm(self) -> Tensor | None:
        """The gradient's norm, a scalar on the device, behind the last backward pass; None: known after `apply`."""

    def apply(self, norm: float) -> bool:
        """Takes the step, or leaves parameters and optimizer as they are where the norm is not finite."""


def update_of(engine: Any, inner: torch.optim.Optimizer, bound: float) -> Update:
    """The kind of an engine.

    Args:
        engine: a `deepspeed.DeepSpeedEngine`, built with `deepspeed_clips`' answer in mind
        inner: torch's optimizer inside
        bound: of the gradient norm; 0 means none
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        return _Offloaded(engine)
    if hasattr(optimizer, "averaged_gradients"):
        return _Partitioned(engine)
    return _Whole(engine, Clipping(inner, bound))


def deepspeed_clips(ds_config: dict) -> bool:
    """Whether DeepSpeed's optimizer clips by the norm that it is given; else `Clipping` does it."""
    zero = ds_config["zero_optimization"]
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    fp32_sums = ds_config["data_types"]["grad_accum_dtype"] == "fp32"
    if zero["stage"] == 1 and ds_config["bf16"]["enabled"]:
        return offloaded or not fp32_sums
    return zero["stage"] > 0


class _Whole:
    """Every rank holds the whole gradient: stage 0, and stage 1 of bf16 (DeepSpeed's BF16_Optimizer)."""

    def __init__(self, engine: Any, clipping: Clipping) -> None:
        self._engine, self._clipping = engine, clipping
        for mark, step in (("fp32_groups_gradients", _bf16_step), ("fp32_groups", _unfused_step)):
            if hasattr(engine.optimizer, mark):
                engine.optimizer.step = MethodType(torch.no_grad()(step), engine.optimizer)
                break

    def norm(self) -> Tensor:
        group = self._engine.mpu.get_tensor_model_parallel_group()
        return global_norm(self._gradients(), tensor_parallel=group, device=self._engine.device)

    def _gradients(self) -> Iterator[Gradients]:
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp32_groups_gradients"):  # the fp32 sums over the micro-batches
            for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
                yield zip(parameters, gradients, strict=True)
        else:
            yield [(p, p.grad) for p in self._engine.module.parameters() if p.grad is not None]

    def apply(self, norm: float) -> bool:
        if not math.isfinite(norm):
            self._engine.zero_grad()
            if hasattr(self._engine.optimizer, "clear_hp_grads"):
                self._engine.optimizer.clear_hp_grads()
            return False
        self._clipping.clip(norm)
        self._engine.step()
        return True


def _bf16_step(optimizer: Any) -> None:
    """BF16_Optimizer's step without its norm. The engine clears all gradients behind it."""
    gradients = optimizer.fp32_groups_gradient_flat_partition
    for master, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
        master.grad = gradient
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()


def _unfused_step(optimizer: Any) -> None:
    """The step of DeepSpeed's unfused optimizer (bf16, stage 0) without its overflow checks and norm."""
    pairs = list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))
    for parameters, masters in pairs:
        for parameter, master in zip(parameters, masters, strict=True):
            gradient = parameter.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.to(master.dtype)
    optimizer.optimizer.step()
    for parameters, masters in pairs:
        for master in masters:
            master.grad = None
        torch._foreach_copy_(parameters, masters)


class _Partitioned:
    """Each rank holds its part of the reduced gradient: stages 1 to 3. DeepSpeed clips by the norm that it is given."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # Stage 3 asks for the norms of its groups, the others for all of it.
        self._asked = "_get_norm_groups" if engine.zero_optimization_partition_weights() else "scaled_global_norm"

    def norm(self) -> Tensor:
        stage3 = self._asked == "_get_norm_groups"
        return global_norm(
            self._gradients(),
            tensor_parallel=self._engine.mpu.get_tensor_model_parallel_group(),
            shards=self._engine.mpu.get_data_parallel_group(),
            device=self._engine.device,
            # What DeepSpeed goes on in at that stage, and what it clips in.
            dtype=torch.float64 if stage3 else torch.float32,
        )

    def _gradients(self) -> Iterator[Gradients]:
        optimizer = self._engine.optimizer
        groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
        for index, parameters in enumerate(groups):
            gradients = (g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
            yield zip(parameters, gradients, strict=False)  # stage 1 and 2: padding behind the last parameter

    def apply(self, norm: float) -> bool:
        optimizer = self._engine.optimizer
        # On the host: DeepSpeed may look at it as often as it likes.
        known = torch.tensor(norm, dtype=torch.float64 if self._asked == "_get_norm_groups" else torch.float32)
        answer = [known] if self._asked == "_get_norm_groups" else known
        setattr(optimizer, self._asked, lambda *_, **__: answer)
        # In bf16 it would search all gradients for what the norm has told already; asked to, it skips the step.
        if hasattr(optimizer, "check_grad_overflow"):
            optimizer.check_grad_overflow = not math.isfinite(norm)
        self._engine.step()
        return bool(self._engine._step_applied)


class _Offloaded:
    """Gradients lie on the host: DeepSpeed's own norm, at its own pace."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def norm(self) -> None:
        return None

    def apply(self, norm: float) -> bool:
        self._engine.step()
        return bool(self._engine._step_applied)
