"""Kernels of rotary embedding, SwiGLU and cross-entropy, and the choice between their implementations.

On an accelerator these three are memory-bound: composed of torch operations, every intermediate result is written and
read again. `plain` does that; it is megatron-core's own code, and the reference of the others. `compiled` and `triton`
read their inputs once, compute in fp32 and write their result once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pause_megatron.errors import ConfigError

Implementation = Literal["plain", "compiled", "triton"]
KernelChoice = Literal["auto", "plain", "compiled", "triton"]
"""Values of `engine.kernels`."""
Device = torch.device | str | int
"""As `torch.device` takes it; an integer is a CUDA device."""


@dataclass(frozen=True)
class Kernels:
    """One implementation of the three functions.

    Attributes:
        name: "plain", "compiled" or "triton".
        rotate: (x [seq, batch, heads, channels], cos, sin fp32 [seq, 1 or batch, channels / 2]) -> like x. Channels c
            and c + channels / 2 are rotated by angle c (Su et al. 2021, in the order of GPT-NeoX). Differentiable in x.
        swiglu: [..., 2 f] -> [..., f]: silu of the first half times the second (Shazeer 2020). Differentiable.
        cross_entropy: (logits [rows, columns], targets int64 [rows], scale scalar fp32, tensor-parallel group,
            differentiable) -> (losses fp32 [rows], gradient of scale x their sum for the logits, in their dtype, or
            None). Columns are this rank's shard of the vocabulary; -inf masks one. The logits may be overwritten.
    """

    name: Implementation
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup, bool], tuple[Tensor, Tensor | None]]

    @property
    def fused(self) -> bool:
        """Whether they replace megatron-core's own code."""
        return self.name != "plain"


def choose_implementation(name: KernelChoice, device: Device) -> Implementation:
    """Return the implementation that `engine.kernels` selects on a device.

    Args:
        name: Value of `engine.kernels`.
        device: Device of the model.

    Raises:
        ConfigError: Triton cannot run there.
    """
    cuda = torch.device(device).type == "cuda"
    if name == "auto":
        return "triton" if cuda and find_spec("triton") else "plain"
    if name == "triton":
        if not cuda and not (find_spec("triton") and _interpreted()):
            raise ConfigError(
                f"engine.kernels: expected a CUDA device for triton, got {torch.device(device).type}; use plain or "
                "compiled"
            )
        if not find_spec("triton"):
            raise ConfigError(
                "engine.kernels: expected triton to be installed, got none; install it, or use compiled or plain"
            )
    return name


def load_kernels(name: KernelChoice, device: Device) -> Kernels:
    """Load the implementation that `engine.kernels` selects on a device.

    Args:
        name: Value of `engine.kernels`.
        device: Device of the model.

    Raises:
        ConfigError: Triton cannot run there, or there is no C compiler.
    """
    implementation = choose_implementation(name, device)
    if implementation == "plain":
        from pause_megatron.model.kernels import plain

        return Kernels(implementation, plain.rotate, plain.swiglu, plain.cross_entropy)
    from pause_megatron.model.kernels import fused

    primitives = fused.compiled_primitives() if implementation == "compiled" else fused.triton_primitives()
    kernels = Kernels(implementation, primitives.rotate, primitives.swiglu, primitives.cross_entropy)
    _check_compiler(kernels, device)
    return kernels


def _check_compiler(kernels: Kernels, device: Device) -> None:
    """Run one kernel: both implementations compile at their first use, with a C compiler that a host may lack."""
    try:
        kernels.swiglu(torch.zeros(1, 2, device=device))
    except Exception as failure:
        raise ConfigError(
            f"engine.kernels: {kernels.name} cannot compile here ({type(failure).__name__}: {str(failure)[:200]}); "
            "install a C compiler (gcc), or use engine.kernels=plain, which is slower on a GPU"
        ) from failure


def _interpreted() -> bool:
    """Return whether Triton's interpreter is switched on (TRITON_INTERPRET=1), which runs on a CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
