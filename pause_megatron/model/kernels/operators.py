"""The Triton kernels as torch operators `torch.ops.pause_megatron.*`.

As operators they have a shape function, so that fake and meta tensors pass. A whole training step can be counted on a
host without a GPU, and `torch.compile` does not trace into them. They have no gradients; those are in `fused.py`.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

# Each reads its inputs once and writes its result once; `cross_entropy_` reads the logits again from the L2 cache.
SCHEMAS = {
    "rotate": "(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    "swiglu": "(Tensor x) -> Tensor",
    "swiglu_backward": "(Tensor gradient, Tensor x) -> Tensor",
    "logit_statistics": "(Tensor logits, Tensor targets) -> Tensor",
    "logit_gradient_": "(Tensor(a!) logits, Tensor targets, Tensor highest, Tensor total, Tensor scale) -> ()",
    "cross_entropy_": "(Tensor(a!) logits, Tensor targets, Tensor scale) -> Tensor",
}


@cache
def registered() -> SimpleNamespace:
    """Define the operators once a process, and return them by name."""
    from pause_megatron.model.kernels import triton_kernels

    library = torch.library.Library("pause_megatron", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        # A CPU serves Triton's interpreter (TRITON_INTERPRET=1).
        for key in ("CUDA", "CPU"):
            library.impl(name, getattr(triton_kernels, name), key)
        library.impl(name, _SHAPES[name], "Meta")
    operators = {name: getattr(torch.ops.pause_megatron, name).default for name in SCHEMAS}
    return SimpleNamespace(**operators, library=library)  # unregistered when the library is collected


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _logit_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


def _logit_gradient_(logits: Tensor, targets: Tensor, highest: Tensor, total: Tensor, scale: Tensor) -> None:
    return None


def _cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


_SHAPES = {
    "rotate": _rotate,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "logit_statistics": _logit_statistics,
    "logit_gradient_": _logit_gradient_,
    "cross_entropy_": _cross_entropy_,
}
