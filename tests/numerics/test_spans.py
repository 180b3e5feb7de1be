"""Attention span by span is attention under the mask: results and gradients, and what the CUDA kernel is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pause_megatron.model.attention import SDPACoreAttention, segment_mask
from pause_megatron.model.spans import Spans, TextSpans, attend, attend_by_kernel, has_variable_length_kernel


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


def attention_core() -> SDPACoreAttention:
    return SDPACoreAttention(SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=8), 1)


def attended(
    mask: torch.Tensor | TextSpans, groups: int, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Result and gradients of the attention core, padding left out."""
    *inputs, upstream = qkv(groups, dtype, device)
    result = attention_core()(*inputs, mask)
    live = (SEGMENTS >= 0).t()[..., None]
    gradients = torch.autograd.grad(result, inputs, (upstream * live).to(result))
    return [result.detach().cpu() * live, *(gradient.cpu() for gradient in gradients)]


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each tensor."""
    gaps = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(gaps).max())


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_spans_are_the_mask(groups, prefix):
    """Forward and gradients, against the mask in fp64; bf16 no worse than the mask in bf16."""
    mask, spans = segment_mask(SEGMENTS, prefix), TextSpans.of(SEGMENTS, prefix)
    exact = attended(mask, groups, torch.float64)
    assert furthest(attended(spans, groups, torch.float64), exact) < 1e-14
    assert furthest(attended(spans, groups, torch.float32), exact) < 1e-6
    rounding = furthest(attended(mask, groups, torch.bfloat16), exact)
    assert furthest(attended(spans, groups, torch.bfloat16), exact) < 1.5 * rounding < 0.05


def test_spans_say_lengths():
    spans = TextSpans.of(SEGMENTS, PREFIX)
    assert spans.texts.lengths == (9, 1, 16, 11, 3, 2, 12, 15, 5)
    assert spans.prefixes.lengths == (4, 1, 11, 1, 12)
    assert spans.texts.bounds.tolist() == [0, 9, 10, 26, 37, 40, 42, 54, 69, 74] and spans.texts.longest == 16
    assert torch.equal(spans.prefix_rows, PREFIX.flatten().nonzero().squeeze(1))
    assert TextSpans.of(SEGMENTS, torch.zeros_like(PREFIX)).prefixes is None


def test_a_prefix_that_is_not_at_the_beginning_is_refused():
    marked = PREFIX.clone()
    marked[1, 30] = True
    with pytest.raises(
        ValueError, match=r"first tokens of each text only, .* sample 1 at position 29; use segment_mask"
    ):
        TextSpans.of(SEGMENTS, marked)


# Before 2.12 torch's kernel takes no grouped queries, and `has_variable_length_kernel` says no to it on any device.
kernel_is_used = pytest.mark.skipif(torch.__version__ < "2.12", reason="the kernel is used from torch 2.12 on")


@kernel_is_used
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_takes_our_call(causal):
    """Shapes, dtypes and argument names only, on tensors without data: `test_kernel_is_the_mask` is the real one."""
    spans = Spans.of(torch.tensor([9, 1, 27]), "meta")
    query, key, value = (torch.empty(37, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    query.requires_grad_()
    assert not has_variable_length_kernel(query)
    result = attend_by_kernel(query, key, value, spans, causal=causal, scale=0.5)
    assert (result.shape, result.dtype) == (query.shape, query.dtype)
    (gradient,) = torch.autograd.grad(result.sum(), query)
    assert gradient.shape == query.shape
    assert attend(query, key, value, spans, causal=causal, scale=0.5).shape == query.shape


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


@kernel_is_used
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_our_call_asks_the_kernel_for_the_same(groups, causal):
    """The values of the arguments; the kernel itself is left to `test_kernel_is_the_mask`."""
    spans = Spans.of(torch.tensor([9, 1, 27]), "cpu")
    inputs = [tensor[:, 0].detach() for tensor in qkv(groups, torch.float64)[:3]]
    with Documented():
        asked = attend_by_kernel(*inputs, spans, causal=causal, scale=0.5)
    assert furthest([asked], [attend(*inputs, spans, causal=causal, scale=0.5)]) < 1e-14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_kernel_is_the_mask(groups, prefix):
    """The variable-length kernel against the mask in fp64. Written without a GPU at hand: it has never been run."""
    spans = TextSpans.of(SEGMENTS, prefix, device="cuda")
    assert has_variable_length_kernel(torch.empty(1, 4, 8, dtype=torch.bfloat16, device="cuda"))
    exact = attended(segment_mask(SEGMENTS, prefix), groups, torch.float64)
    assert furthest(attended(spans, groups, torch.bfloat16, "cuda"), exact) < 0.05
    assert furthest(attended(spans, groups, torch.float32, "cuda"), exact) < 1e-5
