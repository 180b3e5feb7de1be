"""DeepSpeed's optimizer step, with a gradient norm that the host has already read.

DeepSpeed's optimizers compute the norm within their step and synchronize several times: for each parameter (bf16
without ZeRO), for each parameter group (stages 1 to 3), or once more than needed. Here the norm is computed before the
step, read by the host together with the step's other numbers, and passed on as a host number; the step then only
enqueues work. DeepSpeed 0.19.8's remaining synchronizations on a GPU:

  stages 0, 1, 2              none (stage 2 with overlap_comm: the device, once a bucket and once a micro-batch)
  stage 3                     its reduction stream, once a micro-batch; the device, once a step; events of earlier
                              gathers and reductions
  a CPU-offloaded optimizer   its own norm, once a parameter group, and the copies to and from the host
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
    """The optimizer step of one kind of DeepSpeed optimizer."""

    def norm(self) -> Tensor | None:
        """Return the gradient norm after the last backward pass, a scalar on the device; None: known after `apply`."""
        ...

    def apply(self, norm: float) -> bool:
        """Apply the step and return True; skip it and return False where the norm is not finite."""
        ...


def update_of(engine: Any, inner: torch.optim.Optimizer, bound: float) -> Update:
    """Return the optimizer step for an engine's kind of optimizer.

    Args:
        engine: A `deepspeed.DeepSpeedEngine`. Where `deepspeed_clips` is False, its own clipping is off.
        inner: torch's optimizer inside.
        bound: Bound of the gradient norm; 0: no clipping.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        return _Offloaded(engine)
    if hasattr(optimizer, "averaged_gradients"):
        return _Partitioned(engine)
    return _Replicated(engine, Clipping(inner, bound))


def deepspeed_clips(ds_config: dict[str, Any]) -> bool:
    """Return whether DeepSpeed's optimizer clips by the norm that it is given; otherwise `Clipping` does.

    Args:
        ds_config: The complete DeepSpeed configuration.
    """
    zero = ds_config["zero_optimization"]
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    fp32_sums = ds_config["data_types"]["grad_accum_dtype"] == "fp32"
    if zero["stage"] == 1 and ds_config["bf16"]["enabled"]:
        return offloaded or not fp32_sums
    return zero["stage"] > 0


class _Replicated:
    """Every data-parallel rank holds the whole gradient: stage 0, and stage 1 in bf16 (BF16_Optimizer)."""

    def __init__(self, engine: Any, clipping: Clipping) -> None:
        self._engine, self._clipping = engine, clipping
        for attribute, step in (("fp32_groups_gradients", _bf16_step), ("fp32_groups", _unfused_step)):
            if hasattr(engine.optimizer, attribute):
                engine.optimizer.step = MethodType(torch.no_grad()(step), engine.optimizer)
                break

    def norm(self) -> Tensor:
        group = self._engine.mpu.get_tensor_model_parallel_group()
        return global_norm(self._gradients(), tensor_parallel=group, device=self._engine.device)

    def _gradients(self) -> Iterator[Gradients]:
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp32_groups_gradients"):  # fp32 gradient accumulation
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
    """Run BF16_Optimizer's step without its norm. The engine clears all gradients afterwards."""
    gradients = optimizer.fp32_groups_gradient_flat_partition
    for master, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
        master.grad = gradient
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()


def _unfused_step(optimizer: Any) -> None:
    """Run the step of DeepSpeed's unfused optimizer (bf16, stage 0) without its overflow checks and norm."""
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
    """Each data-parallel rank holds a shard of the gradient: stages 1 to 3. DeepSpeed clips by the norm it is given."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._stage3 = bool(engine.zero_optimization_partition_weights())

    def norm(self) -> Tensor:
        return global_norm(
            self._gradients(),
            tensor_parallel=self._engine.mpu.get_tensor_model_parallel_group(),
            shards=self._engine.mpu.get_data_parallel_group(),
            device=self._engine.device,
            dtype=self._norm_type,
        )

    @property
    def _norm_type(self) -> torch.dtype:
        """The type in which DeepSpeed clips at this stage."""
        return torch.float64 if self._stage3 else torch.float32

    def _gradients(self) -> Iterator[Gradients]:
        optimizer = self._engine.optimizer
        groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
        for index, parameters in enumerate(groups):
            gradients = (g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
            yield zip(parameters, gradients, strict=False)  # stages 1 and 2 have padding after the last

    def apply(self, norm: float) -> bool:
        optimizer = self._engine.optimizer
        known = torch.tensor(norm, dtype=self._norm_type)  # on the host, where reading it costs nothing
        if self._stage3:
            optimizer._get_norm_groups = lambda *_, **__: [known]  # the norms of its parameter groups
        else:
            optimizer.scaled_global_norm = lambda *_, **__: known
        # In bf16 it would search the gradients for infinities, which the norm shows already; it then skips the step.
        if hasattr(optimizer, "check_grad_overflow"):
            optimizer.check_grad_overflow = not math.isfinite(norm)
        self._engine.step()
        return bool(self._engine._step_applied)


class _Offloaded:
    """Gradients are on the host: the step computes its own norm and synchronizes."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def norm(self) -> None:
        return None

    def apply(self, norm: float) -> bool:
        self._engine.step()
        return bool(self._engine._step_applied)
