"""Rotary embedding, SwiGLU and cross-entropy, each in one pass over memory, and which form of them runs where.

On an accelerator these three are bound by memory: composed of torch operations, every intermediate result is written
and read again. `plain` (megatron-core's own code, and the reference that the others are compared with) does that;
`compiled` and `triton` read their inputs once, compute in fp32 and write their result once.
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

Name = Literal["plain", "compiled", "triton"]


@dataclass(frozen=True)
class Kernels:
    """One form of the three functions.

    Attributes:
        name: "plain", "compiled" or "triton"
        rotate: (x [seq, batch, heads, channels], cos, sin fp32 [seq, 1 or batch, channels / 2]) -> like x; channels c
            and c + channels / 2 are turned by angle c (Su et al. 2021, in the order of GPT-NeoX). Differentiable in x
        swiglu: [..., 2 f] -> [..., f]: silu of the first half times the second (Shazeer 2020). Differentiable
        cross_entropy: (logits [rows, columns], targets int64 [rows], scale scalar fp32, tensor-parallel group,
            differentiable) -> (losses fp32 [rows], gradient of scale x their sum for the logits, in their dtype, or
            None). Columns are this rank's shard of the vocabulary; -inf leaves one out. The logits are used up
    """

    name: Name
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup, bool], tuple[Tensor, Tensor | None]]

    @property
    def fused(self) -> bool:
        """Whether they take the place of megatron-core's own code."""
        return self.name != "plain"


def resolve(name: str, device: torch.device | str) -> Name:
    """Which form `engine.kernels` means on a device.

    Raises:
        ConfigError: triton where it cannot run.
    """
    cuda = torch.device(device).type == "cuda"
    if name == "auto":
        return "triton" if cuda and find_spec("triton") else "plain"
    if name == "triton":
        if not cuda and not (find_spec("triton") and _interpreted()):
            raise ConfigError(
                f"engine.kernels: triton needs a CUDA device, got {torch.device(device).type}; use plain or compiled"
            )
        if not find_spec("triton"):
            raise ConfigError("engine.kernels: triton is not installed here; install triton, or use compiled or plain")
    return name


def kernels(name: str, device: torch.device | str) -> Kernels:
    """Return a form of the three functions.

    Args:
        name: "auto", "plain", "compiled" or "triton", as `engine.kernels`.
        device: where they will run.

    Raises:
        ConfigError: triton where it cannot run, or nothing can be compiled.
    """
    name = resolve(name, device)
    if name == "plain":
        from pause_megatron.model.kernels import plain

        return Kernels(name, plain.rotate, plain.swiglu, plain.cross_entropy)
    from pause_megatron.model.kernels import fused

    pieces = fused.compiled_pieces() if name == "compiled" else fused.triton_pieces()
    made = Kernels(name, pieces.rotate, pieces.swiglu, pieces.cross_entropy)
    _try(made, device)
    return made


def _try(made: Kernels, device: torch.device | str) -> None:
    """Run one of them: both forms compile at their first use, with a C compiler that a machine may not have."""
    try:
        made.swiglu(torch.zeros(1, 2, device=device))
    except Exception as failure:
        raise ConfigError(
            f"engine.kernels: {made.name} cannot compile here ({type(failure).__name__}: {str(failure)[:200]}); "
            "install a C compiler (gcc), or use engine.kernels=plain, which is slower on a GPU"
        ) from failure


def _interpreted() -> bool:
    """Whether Triton's interpreter is asked for (TRITON_INTERPRET=1), which runs on a CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
