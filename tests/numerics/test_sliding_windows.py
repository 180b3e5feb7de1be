"""Sliding windows in the attention core: which tokens are attended to, which masks are made, and how often."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_on_ranks
from support.span_cases import PREFIX, SEGMENTS, attention_core, qkv
from support.tiny_model import SEQ, batch, section, tiny

from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.errors import ConfigError
from pause_megatron.model.attention import additive_mask, segment_mask
from pause_megatron.model.layers import block_spec
from pause_megatron.model.variable_length import PackedSegments

LENGTH = SEGMENTS.shape[1]
WINDOWS = (1, 3, 8, LENGTH - 1, LENGTH, 50)


def attended(window: int | None, mask, live: torch.Tensor, groups: int = 2) -> list[torch.Tensor]:
    """Result and gradients of live tokens, bool [batch, seq]."""
    *inputs, upstream = qkv(groups, torch.float64)
    result = attention_core(window)(*inputs, mask) * live.t()[..., None]
    return [result.detach(), *torch.autograd.grad(result, inputs, upstream.to(result))]


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference. A window of one token leaves no gradient of queries and keys to compare it with."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def by_definition(window: int, segments: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """True where a query must not attend, token by token."""
    hidden = torch.ones(*segments.shape, segments.shape[1], dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for i, j in torch.cartesian_prod(torch.arange(len(row)), torch.arange(len(row))).tolist():
            together = prefix is not None and bool(prefix[b, i] and prefix[b, j])
            hidden[b, i, j] = row[i] != row[j] or not (i - window < j <= i or together)
    return hidden[:, None]


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_are_their_definition(window):
    one = torch.zeros_like(SEGMENTS)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for groups in (4, 2, 1):
        live = one == 0
        expected = attended(None, by_definition(window, one), live, groups)
        given = (None, PackedSegments.of(one), causal[None, None], additive_mask(causal[None, None], torch.float64))
        for mask in given:
            assert furthest(attended(window, mask, live, groups), expected) < 1e-13
    for prefix in (None, PREFIX):
        hidden = by_definition(window, SEGMENTS, prefix)
        assert torch.equal(segment_mask(SEGMENTS, prefix, window), hidden)
        packed = PackedSegments.of(SEGMENTS, prefix)
        live = SEGMENTS >= 0
        assert furthest(attended(window, packed, live), attended(None, hidden, live)) < 1e-13


def masks_of_layers(window: int, kind: str) -> list[tuple[bool, int | None]]:
    """For each call of torch's attention: whether it is causal, and where its mask is in memory."""
    from pause_megatron.distributed import initialize

    calls = []
    attention = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **options):
        calls.append((is_causal, None if attn_mask is None else attn_mask.data_ptr()))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    with initialize(ParallelSection(), device="cpu"):
        model = tiny(parallel=ParallelSection(), layers=3, sliding_window=window, sliding_from=1, qkv_bias=True)
        data = batch(1.0)
        whole = torch.zeros(data["tokens"].shape, dtype=torch.int32)
        mask = {"none": None, "mask": segment_mask(whole), "lengths": PackedSegments.of(whole)}[kind]
        with patch.object(F, "scaled_dot_product_attention", spy):
            for _ in range(2):
                model.logits(data["tokens"], data["position_ids"], mask).sum().backward()
                calls.append((False, -1))
    return calls


@pytest.mark.parametrize("kind", ["none", "mask", "lengths"])
def test_layers_share_a_mask_which_exists_only_where_the_window_is_shorter(kind):
    for window in (5, SEQ, SEQ + 1):
        (calls,) = run_on_ranks(1, masks_of_layers, window, kind)
        for begin in (0, len(calls) // 2):
            step = calls[begin : begin + len(calls) // 2 - 1]
            full, sliding = step[: len(step) // 3], step[len(step) // 3 :]
            assert len({place for _, place in sliding}) == 1 and len(full) in (1, 3)
            if kind != "mask":
                assert set(full) == {(True, None)}
                assert set(sliding) == {(True, None)} or (window < SEQ and not sliding[0][0])
            elif window >= SEQ:
                assert len({place for _, place in step}) == 1
            assert (sliding[0] != full[0]) is (window < SEQ)


def test_a_window_made_while_generating_serves_training():
    *inputs, upstream = qkv(2, torch.float32)
    attention = attention_core(3)
    with torch.inference_mode():
        attention(*(tensor.detach() for tensor in inputs))
    result = attention(*inputs)
    assert torch.autograd.grad(result, inputs, upstream)[0].any()


def test_transformer_engine_is_refused_with_options_that_it_was_not_tried_with():
    for options in (
        *({"qk_norm": "head"}, {"qk_norm": "whole"}, {"norm": "post"}, {"proj_bias": True}, {"mlp_bias": True}),
        {"windows": (None, 4)},
    ):
        with pytest.raises(ConfigError, match=r"model.attention: expected sdpa with model\.\w+, got 'te'"):
            block_spec(2, attention="te", **options)
    for options in (
        {"qk_norm": "head"},
        {"qk_norm": "whole", "norm": "post"},
        {"mlp_bias": True},
        {"sliding_window": 4},
    ):
        with pytest.raises(ConfigError, match=r"expected model.attention=sdpa with .* got model.attention=te"):
            check_shape(section(attention="te", **options), ParallelSection(), SEQ)
    check_shape(section(attention="te", head_dim=12, qkv_bias=True), ParallelSection(), SEQ)
