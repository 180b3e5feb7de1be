"""Windows of texts with prefixes, and what attention makes of them: for tests on a CPU and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pause_megatron.model.attention import SDPACoreAttention
from pause_megatron.model.variable_length import PackedSegments
from pause_megatron.model.window import SlidingWindow

# Windows of 37 tokens: texts of 1 to 16 tokens, padding on both sides; prefixes of none, some and all tokens of a text.
SEGMENTS = torch.tensor([[0] * 9 + [1] + [2] * 16 + [3] * 11, [-1] * 3 + [0] * 2 + [1] * 12 + [4] * 15 + [-1] * 5])
PREFIX = torch.zeros(2, 37, dtype=torch.bool)
for _row, _places in ((0, slice(0, 4)), (0, slice(9, 10)), (0, slice(26, 37)), (1, slice(5, 6)), (1, slice(17, 29))):
    PREFIX[_row, _places] = True


def qkv(groups: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Queries [37, 2, 4, 8], keys and values [37, 2, groups, 8] that want gradients, and a gradient of the result."""
    generator = torch.Generator().manual_seed(groups)
    shapes = ((37, 2, 4, 8), (37, 2, groups, 8), (37, 2, groups, 8))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [*(tensor.requires_grad_() for tensor in made), torch.randn(37, 2, 32, generator=generator)]


def attention_core(window: int | None = None) -> SDPACoreAttention:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=8)
    return SDPACoreAttention(config, 1, window=window and SlidingWindow(window))


def attended(
    mask: torch.Tensor | PackedSegments | None,
    groups: int,
    dtype: torch.dtype,
    device: str = "cpu",
    window: int | None = None,
) -> list[torch.Tensor]:
    """Result and gradients of the attention core, padding left out."""
    *inputs, upstream = qkv(groups, dtype, device)
    result = attention_core(window)(*inputs, mask)
    live = (SEGMENTS >= 0).t()[..., None]
    gradients = torch.autograd.grad(result, inputs, (upstream * live).to(result))
    return [result.detach().cpu() * live, *(gradient.cpu() for gradient in gradients)]


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each tensor."""
    gaps = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(gaps).max())
