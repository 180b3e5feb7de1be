"""Attention per segment equals attention under the mask: results, gradients, and arguments of the CUDA kernel."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.span_cases import PREFIX, SEGMENTS, attended, furthest, qkv
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from pause_megatron.model.attention import segment_mask
from pause_megatron.model.variable_length import (
    PackedSegments,
    SegmentLengths,
    has_variable_length_kernel,
    takes_call,
    varlen_attention,
    varlen_kernel_attention,
)
from pause_megatron.model.window import SlidingWindow


def test_mask_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 2, 2, 2, 2]], dtype=torch.int32)
    prefix = torch.rand(segments.shape, generator=generator) < 0.5
    for marked in (None, prefix):
        hidden = segment_mask(segments, marked)
        assert hidden.shape == (2, 1, 9, 9) and hidden.dtype == torch.bool
        for b in range(2):
            for i in range(9):
                for j in range(9):
                    together = marked is not None and marked[b, i] and marked[b, j]
                    sees = segments[b, i] == segments[b, j] and (j <= i or together)
                    assert bool(hidden[b, 0, i, j]) is not bool(sees)
        assert not hidden.diagonal(dim1=2, dim2=3).any()


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_spans_are_the_mask(groups, prefix):
    """Forward and gradients, against the mask in fp64; bf16 no worse than the mask in bf16."""
    mask, spans = segment_mask(SEGMENTS, prefix), PackedSegments.of(SEGMENTS, prefix)
    exact = attended(mask, groups, torch.float64)
    assert furthest(attended(spans, groups, torch.float64), exact) < 1e-14
    assert furthest(attended(spans, groups, torch.float32), exact) < 1e-6
    rounding = furthest(attended(mask, groups, torch.bfloat16), exact)
    assert furthest(attended(spans, groups, torch.bfloat16), exact) < 1.5 * rounding < 0.05


def test_spans_say_lengths():
    spans = PackedSegments.of(SEGMENTS, PREFIX)
    assert spans.segments.lengths == (9, 1, 16, 11, 3, 2, 12, 15, 5)
    assert spans.prefixes.lengths == (4, 1, 11, 1, 12)
    assert spans.segments.cu_seqlens.tolist() == [0, 9, 10, 26, 37, 40, 42, 54, 69, 74]
    assert spans.segments.max_seqlen == 16
    assert torch.equal(spans.prefix_rows, PREFIX.flatten().nonzero().squeeze(1))
    assert PackedSegments.of(SEGMENTS, torch.zeros_like(PREFIX)).prefixes is None


def test_a_prefix_that_is_not_at_the_beginning_is_refused():
    marked = PREFIX.clone()
    marked[1, 30] = True
    with pytest.raises(
        ValueError, match=r"first tokens of each segment only, .* sample 1 at position 29; use segment_mask"
    ):
        PackedSegments.of(SEGMENTS, marked)


# As torch documents them.
SIGNATURES = {
    "2.10": "query key value cu_seq_q cu_seq_k max_q max_k is_causal return_aux",
    "2.11": "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size",
    "2.12": (
        "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size enable_gqa seqused_k block_table "
        "num_splits"
    ),
}
OWN = tuple(inspect.signature(varlen_attn).parameters)
KERNEL_GROUPS = [groups for groups in (4, 2, 1) if takes_call(OWN, grouped=groups != 4)]


@pytest.mark.parametrize(
    ("version", "plain", "grouped"), [("2.10", False, False), ("2.11", True, False), ("2.12", True, True)]
)
def test_the_signature_decides_whether_the_kernel_is_used(version, plain, grouped):
    parameters = SIGNATURES[version].split()
    assert (takes_call(parameters, grouped=False), takes_call(parameters, grouped=True)) == (plain, grouped)


def test_this_torch_has_the_documented_parameters():
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    documented = SIGNATURES["2.12" if (major, minor) >= (2, 12) else f"{major}.{minor}"].split()
    assert set(documented) <= set(OWN)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", KERNEL_GROUPS)
def test_the_kernel_takes_our_call(groups, causal):
    """Shapes, dtypes and argument names only, on meta tensors; test_variable_length_gpu.py checks the results."""
    spans = SegmentLengths.of(torch.tensor([9, 1, 27]), "meta")
    query, key, value = (
        torch.empty(37, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, groups, groups)
    )
    query.requires_grad_()
    assert not has_variable_length_kernel(query, key)
    result = varlen_kernel_attention(query, key, value, spans, causal=causal, scale=0.5)
    assert (result.shape, result.dtype) == (query.shape, query.dtype)
    (gradient,) = torch.autograd.grad(result.sum(), query)
    assert gradient.shape == query.shape
    assert varlen_attention(query, key, value, spans, causal=causal, scale=0.5).shape == query.shape


class Documented(TorchDispatchMode):
    """In place of the kernel, which wants CUDA: what torch's documentation says that its arguments mean."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.torch_attn._varlen_attn.default:
            return function(*args, **(kwargs or {}))
        query, key, value, bounds, key_bounds, longest, longest_key, _, scale, window, *rest = args
        grouped, others = (rest or [False])[0], rest[1:]  # torch leaves trailing defaults out
        assert (bounds.dtype, bounds.device, bounds.is_contiguous()) == (torch.int32, query.device, True)
        assert torch.equal(bounds, key_bounds) and longest == longest_key == int(bounds.diff().max())
        assert (int(bounds[0]), int(bounds[-1])) == (0, len(query)) and not any(others)
        repeats = query.shape[1] // key.shape[1]
        assert grouped is (repeats > 1)
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
        place = torch.arange(len(query))
        sequence = torch.bucketize(place, bounds, right=True)
        seen = sequence[:, None] == sequence
        before = place[:, None] - place  # tokens from key to query, negative for later keys
        left, right = window  # how far a query looks to either side; -1: as far as its sequence goes
        seen &= (before <= left if left >= 0 else True) & (-before <= right if right >= 0 else True)
        scores = torch.einsum("ihc,jhc->hij", query * scale, key).masked_fill(~seen, float("-inf"))
        result = torch.einsum("hij,jhc->ihc", scores.softmax(-1), value).contiguous()
        return result, scores.logsumexp(-1), torch.zeros(2, dtype=torch.uint64)


@pytest.mark.parametrize(("causal", "size"), [(True, None), (False, None), (True, 1), (True, 5), (True, 27)])
@pytest.mark.parametrize("groups", KERNEL_GROUPS)
def test_our_call_asks_the_kernel_for_the_same(groups, causal, size):
    """The values of the arguments; the kernel itself is left to tests/gpu."""
    window = size and SlidingWindow(size)
    spans = SegmentLengths.of(torch.tensor([9, 1, 27]), "cpu")
    inputs = [tensor[:, 0].detach() for tensor in qkv(groups, torch.float64)[:3]]
    with Documented():
        asked = varlen_kernel_attention(*inputs, spans, causal=causal, scale=0.5, window=window)
    assert furthest([asked], [varlen_attention(*inputs, spans, causal=causal, scale=0.5, window=window)]) < 1e-14
