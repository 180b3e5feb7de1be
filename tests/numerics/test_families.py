"""Every family beside transformers' own model: logits, gradients, tensor parallelism, documents, prefixes."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from support.random_families import ROWS, SEQ, draw_section, hf_model, native_shards, resolved
from support.ranks import run_on_ranks

from pause_megatron.config.families import FAMILIES, layer_tensors
from pause_megatron.config.model_schema import ModelSection
from pause_megatron.config.schema import ParallelSection


def built(
    section: ModelSection,
    parallel: ParallelSection,
    weights: dict[str, torch.Tensor],
    fused: bool = False,
    shared: bool = False,
):
    """The native model with the weights of a Hugging Face model."""
    from pause_megatron.model import Vocabulary, build, build_model
    from pause_megatron.model.kernels import Kernels
    from pause_megatron.model.kernels.fused import torch_primitives

    vocabulary = Vocabulary(ROWS - 1, (ROWS - 1,))
    primitives = torch_primitives()  # the fused kernels' own code, without a compiler
    loaded = Kernels("compiled", primitives.rotate, primitives.swiglu, primitives.cross_entropy)
    with patch.object(build, "load_kernels", lambda *_: loaded) if fused else nullcontext():
        ours = build_model(
            section,
            vocabulary=vocabulary,
            sequence_length=SEQ,
            parallel=parallel,
            kernels="plain",
            draw=False,
            given_positions=shared,
        )
    model = resolved(section, parallel)
    tp = ours.pg_collection.tp
    # Copies of a looped layer are equal: their sum is a multiple.
    shards = native_shards(model, weights, ours.vocab_size, tp.rank(), tp.size())
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == shards.keys()
    names = [name for name in parameters if name.startswith("decoder.layers.0.")]
    assert names == [f"decoder.layers.0.{tensor.name}" for tensor in layer_tensors(model)]
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == shards[name].shape, name
            copies = model.order.count(int(name.split(".")[2])) if name.startswith("decoder.layers.") else 1
            parameter.copy_(shards[name] / copies)
    return ours


def case(
    section: ModelSection, parallel: ParallelSection, seed: int, fused: bool = False, shared: bool = False
) -> tuple[float, float]:
    """Largest difference of a logit relative to the largest one, and of a gradient relative to its tensor's largest.

    With shared positions, transformers gets them and a mask. Some tensors have no gradient but rounding (queries and
    keys, where a token attends to itself only).
    """
    model = resolved(section, parallel)
    theirs = hf_model(model, seed)
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    ours = built(section, parallel, {name: weight.detach() for name, weight in weights.items()}, fused, shared)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, ROWS, (2, SEQ), generator=generator)
    labels = torch.randint(0, ROWS - 1, (2, SEQ), generator=generator)
    positions, given = torch.arange(SEQ).expand(2, SEQ), {}
    if shared:
        is_text = torch.rand(2, SEQ, generator=generator) < 0.6
        positions = (is_text.cumsum(1) - 1).clamp(min=0)
        given = {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}
    logits = theirs(tokens, **given).logits
    with torch.no_grad():
        difference = float((ours.eval().logits(tokens, positions) - logits).abs().max() / logits.abs().max())
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours.train()(tokens, positions, labels=labels).sum().backward()
    tp = ours.pg_collection.tp
    gradients = {name: weight.grad for name, weight in weights.items()}
    expected = native_shards(model, gradients, ours.vocab_size, tp.rank(), tp.size())
    worst, least = 0.0, 1e-2 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        scale = max(float(expected[name].abs().max()), least)
        worst = max(worst, float((parameter.grad - expected[name]).abs().max()) / scale)
    return difference, worst


WINDOWED = {"layers": 3, "loops": 2, "loop_layers": "1..2", "sliding_window": 7, "sliding_from": 1}
SHARED = [
    *(("llama", {"qkv_bias": True, "proj_bias": True, "loops": 2}), ("qwen3", WINDOWED)),
    *(("olmo2", {"loops": 2, "loop_layers": "1..1"}), ("olmo2", {"loops": 1, "head_dim": 8})),
]
"""Options beside key heads that are fewer than the ranks. Each rank then has one, and shares it with others."""


def shared_heads(tensor: int, sequence: bool) -> dict[str, tuple[float, float]]:
    """Differences where ranks share key heads, by name."""
    from pause_megatron.distributed import initialize

    found = {}
    with initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu"):
        for (family, options), kv_heads in itertools.product(SHARED, (1, 2)[: tensor // 2]):
            recompute = "full" if options["loops"] == kv_heads else "none"
            parallel = ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute)
            section = draw_section(family, 0, kv_heads=kv_heads, **options)
            found[f"{recompute} {section}"] = case(section, parallel, 3)
    return found


@pytest.mark.parametrize(("tensor", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_ranks_that_share_key_heads_compute_what_transformers_does(tensor, sequence):
    for found in run_on_ranks(tensor, shared_heads, tensor, sequence):
        assert len(found) == len(SHARED) * tensor // 2
        for name, (logits, gradients) in found.items():
            assert logits < 1e-5 and gradients < 2e-5, (name, logits, gradients)


def random_cases(tensor: int, sequence: bool, seeds: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Differences of random configurations of all families, by name."""
    from pause_megatron.distributed import initialize

    found = {}
    with initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu"):
        for family, seed in itertools.product(FAMILIES, seeds):
            recompute = "full" if seed % 2 else "none"
            parallel = ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute)
            section = draw_section(family, seed)
            shared = (seed + len(family)) % 2 == 0
            found[f"{seed} {section}"] = case(section, parallel, seed, fused=seed % 3 == 0, shared=shared)
    return found


@pytest.mark.parametrize(
    ("tensor", "sequence", "seeds"),
    [(1, False, tuple(range(8))), (2, False, (0, 1, 8)), (2, True, (2, 3)), (4, False, (4, 5)), (4, True, (6, 7))],
)
def test_random_configurations_compute_what_transformers_does(tensor, sequence, seeds):
    for found in run_on_ranks(tensor, random_cases, tensor, sequence, seeds):
        assert len(found) == len(FAMILIES) * len(seeds)
        for name, (logits, gradients) in found.items():
            assert logits < 1e-5 and gradients < 2e-5, (name, logits, gradients)


LENGTHS = (5, 1, 20, SEQ - 26)


def documents() -> dict[str, float]:
    """Difference of the logits of packed documents from those of each document alone, by family."""
    from pause_megatron.distributed import initialize
    from pause_megatron.model.attention import segment_mask
    from pause_megatron.model.variable_length import PackedSegments

    found = {}
    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        for family, seed in itertools.product(FAMILIES, (1, 2)):
            section = draw_section(family, seed)
            theirs = hf_model(resolved(section, parallel), seed)
            ours = built(section, parallel, dict(theirs.named_parameters(remove_duplicate=False)))
            tokens = torch.randint(0, ROWS, (1, SEQ), generator=torch.Generator().manual_seed(seed))
            segments = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
            positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
            with torch.no_grad():
                alone = torch.cat([theirs(part).logits for part in tokens.split(LENGTHS, dim=1)], dim=1)
                for name, mask in (("lengths", PackedSegments.of(segments)), ("mask", segment_mask(segments))):
                    difference = (ours.logits(tokens, positions, mask) - alone).abs().max() / alone.abs().max()
                    found[f"{name} {section}"] = float(difference)
    return found


def test_packed_documents_are_each_document_alone():
    (found,) = run_on_ranks(1, documents)
    assert len(found) == 4 * len(FAMILIES)
    assert all(difference < 1e-5 for difference in found.values()), found


def prefixes() -> list[float]:
    """Differences of a prefix LM with sliding windows from transformers' model with its own mask."""
    from inspect import signature

    from transformers.masking_utils import create_sliding_window_causal_mask

    # transformers 5.0 wants the positions, and skips no mask where a function is given.
    known = signature(create_sliding_window_causal_mask).parameters
    more = {"cache_position": torch.arange(SEQ), "allow_is_causal_skip": False}
    more = {name: value for name, value in more.items() if name in known}

    from pause_megatron.distributed import initialize
    from pause_megatron.model.variable_length import PackedSegments

    found = []
    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        for window in (1, 4, 9, SEQ):
            section = draw_section("mistral", 0, sliding_window=window)
            theirs = hf_model(resolved(section, parallel), 1)
            ours = built(section, parallel, dict(theirs.named_parameters(remove_duplicate=False)))
            tokens = torch.randint(0, ROWS, (2, SEQ), generator=torch.Generator().manual_seed(window))
            marked = torch.arange(SEQ) < torch.tensor([[7], [21]])
            mask = create_sliding_window_causal_mask(
                theirs.config,
                theirs.get_input_embeddings()(tokens),
                None,
                past_key_values=None,
                or_mask_function=lambda b, _, q, k, marked=marked: marked[b, q] & marked[b, k],
                **more,
            )
            with torch.no_grad():
                expected = theirs(tokens, attention_mask=mask).logits
                packed = PackedSegments.of(torch.zeros_like(tokens), marked)
                got = ours.logits(tokens, torch.arange(SEQ).expand(2, SEQ), packed)
            found.append(float((got - expected).abs().max() / expected.abs().max()))
    return found


def test_a_bidirectional_prefix_is_wider_than_the_window_as_in_transformers():
    (found,) = run_on_ranks(1, prefixes)
    assert len(found) == 4 and all(difference < 1e-5 for difference in found), found


def drawn(tensor: int) -> list[dict[str, torch.Tensor]]:
    """Initial weights of some options, put together from all ranks."""
    from support.tiny_model import tiny, whole

    from pause_megatron.distributed import initialize

    parallel = ParallelSection(tensor=tensor)
    found = []
    with initialize(parallel, device="cpu") as context:
        for options in (
            {"qk_norm": "whole", "norm": "post", "kv_heads": 1, "qkv_bias": True, "proj_bias": True},
            {"qk_norm": "head", "head_dim": 16, "kv_heads": 2},
            {"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
        ):
            model = tiny(parallel=parallel, **options)
            found.append(whole(model, {name: p.detach() for name, p in model.named_parameters()}, context.tp_group))
    return found


def test_initial_weights_do_not_depend_on_the_ranks():
    (expected,) = run_on_ranks(1, drawn, 1)
    assert {float(v.sum()) for o in expected for n, v in o.items() if n.endswith(".bias")} == {0.0}
    assert all(bool((v == 1).all()) for o in expected for n, v in o.items() if "norm" in n)
    for ranks in (2, 4):
        for found in run_on_ranks(ranks, drawn, ranks):
            for got, weights in zip(found, expected, strict=True):
                assert all(torch.equal(got[name], value) for name, value in weights.items())
                assert got.keys() == weights.keys()
