"""Torch's variable-length attention kernel is attention under the mask."""

from __future__ import annotations

import pytest
import torch
from support.span_cases import PREFIX, SEGMENTS, attended, furthest

from pause_megatron.model.attention import segment_mask
from pause_megatron.model.variable_length import PackedSegments, has_variable_length_kernel, takes_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_kernel_is_the_mask(groups, prefix, window):
    """Against the mask in fp64."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    spans = PackedSegments.of(SEGMENTS, prefix, device="cuda")
    query, key = (torch.empty(1, heads, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, groups))
    # Torch 2.11 has no grouped queries: there each span is a call of its own.
    assert has_variable_length_kernel(query, key) == takes_call(
        inspect.signature(varlen_attn).parameters, grouped=groups != 4
    )
    assert has_variable_length_kernel(query, query)
    exact = attended(segment_mask(SEGMENTS, prefix, window), groups, torch.float64)
    assert furthest(attended(spans, groups, torch.bfloat16, "cuda", window), exact) < 0.05
    assert furthest(attended(spans, groups, torch.float32, "cuda", window), exact) < 1e-5
    if window is not None:  # without segments, the kernel takes the place of a mask
        exact = attended(segment_mask(torch.zeros_like(SEGMENTS), None, window), groups, torch.float64)
        assert furthest(attended(None, groups, torch.bfloat16, "cuda", window), exact) < 0.05
        assert furthest(attended(None, groups, torch.float32, "cuda", window), exact) < 1e-5
