"""Attention, norm, recomputation, initial weights, sequence-parallel sums, weight decay, FLOPs, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_model import SEQ, TEXT_SIZE, batch, distance, loss_of, section, take_gradients, tiny

from pause_megatron.config.presets import parameters
from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.errors import ConfigError
from pause_megatron.model import Vocabulary
from pause_megatron.model.attention import SDPACoreAttention
from pause_megatron.model.layers import block_spec
from pause_megatron.model.norm import RMSNorm


def explicit_attention(query, key, value, hidden):
    """softmax(q k^T / sqrt(d)) v, head by head; hidden[b, 1, s, s] True where a query must not look."""
    seq, size, heads, channels = query.shape
    repeat = heads // key.shape[2]
    result = torch.empty(seq, size, heads, channels, dtype=torch.float64)
    for b in range(size):
        for h in range(heads):
            q, k, v = (t[:, b, g].double() for t, g in ((query, h), (key, h // repeat), (value, h // repeat)))
            scores = (q @ k.t() / math.sqrt(channels)).masked_fill(hidden[b, 0], -math.inf)
            result[:, b, h] = scores.softmax(dim=-1) @ v
    return result.view(seq, size, heads * channels)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "prefix", "blocks"])
def test_attention_is_what_it_says(groups, kind):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(9, 2, 4, 8, generator=generator)
    key, value = (torch.randn(9, 2, groups, 8, generator=generator) for _ in range(2))
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1).expand(2, 1, 9, 9).clone()
    if kind == "prefix":
        hidden[0, 0, :, :4] = False
        hidden[1, 0, :, :6] = False
    elif kind == "blocks":
        hidden[:, 0, 5:, :5] = True
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=8)
    core = SDPACoreAttention(config, 1)
    got = core(query, key, value, None if kind == "causal" else hidden)
    torch.testing.assert_close(got.double(), explicit_attention(query, key, value, hidden), rtol=1e-5, atol=1e-6)


def test_norm_has_the_bits_of_torch():
    x = torch.randn(5, 3, 32)
    for sequence in (False, True):
        config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence, use_cpu_initialization=True)
        norm = RMSNorm(config, 32, eps=1e-5)
        assert norm.weight.sequence_parallel is sequence
        assert torch.equal(norm(x), torch.nn.RMSNorm(32, eps=1e-5)(x))


def prefix_reach() -> list[bool]:
    """Which logits change when a token of the prefix, or one after it, is exchanged."""
    from pause_megatron.distributed import initialize

    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        model = tiny(parallel=parallel)
        data = batch(1.0, size=1)
        hidden = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)[None, None]
        hidden[..., :6] = False
        answers = []
        for mask, position in ((None, 4), (hidden, 4), (hidden, 9)):
            other = data["tokens"].clone()
            other[0, position] = (other[0, position] + 1) % TEXT_SIZE
            with torch.no_grad():
                before = model.logits(data["tokens"], data["position_ids"], mask)
                after = model.logits(other, data["position_ids"], mask)
            assert before.shape == (1, SEQ, TEXT_SIZE + 1)
            answers.append((before != after).any(dim=-1)[0].tolist())
        return answers


def test_prefix_mask_reaches_back_inside_the_prefix_only():
    (causal, prefix, behind) = run_on_ranks(1, prefix_reach)[0]
    assert causal == [i >= 4 for i in range(SEQ)]
    assert prefix == [True] * SEQ
    assert behind == [i >= 9 for i in range(SEQ)]


def recomputed_equals(tensor: int, sequence: bool) -> bool:
    from pause_megatron.distributed import initialize

    results = []
    with initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu"):
        for recompute in ("none", "full"):
            model = tiny(parallel=ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute))
            out = loss_of(model, batch(0.8))
            out.loss.backward()
            results.append((out.loss.detach(), take_gradients(model)))
    (loss, gradients), (other, others) = results
    return torch.equal(loss, other) and distance(others, gradients) == 0


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, True)])
def test_recomputation_changes_no_bit(tensor, sequence):
    assert all(run_on_ranks(tensor, recomputed_equals, tensor, sequence))


def unsummed_gradients(sequence: bool, where: str, options: dict) -> tuple[str, str]:
    """What the start-up check says when a norm's hook is missing, and when it is there twice."""
    from pause_megatron.distributed import initialize
    from pause_megatron.errors import TrainingError
    from pause_megatron.model.sequence_parallel import check_gradient_sums, sum_gradients_over

    parallel = ParallelSection(tensor=2, sequence=sequence)
    said = []
    with initialize(parallel, device="cpu") as context:
        for twice in (False, True):
            model = tiny(parallel=parallel, **options)
            check_gradient_sums(model, context.tp_group)
            norm = model.get_submodule(where)
            if twice:
                sum_gradients_over(norm_of(model, where), context.tp_group)
            else:
                norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
            try:
                check_gradient_sums(model, context.tp_group)
            except TrainingError as error:
                said.append(str(error))
    return tuple(said)


def norm_of(model: torch.nn.Module, where: str) -> torch.nn.Module:
    """The norm under its own name, as the hooks look for it."""
    norms = torch.nn.Module()
    norms.add_module(where.rpartition(".")[2], model.get_submodule(where))
    return norms


@pytest.mark.parametrize(
    ("sequence", "where", "options"),
    [
        (True, "decoder.layers.1.pre_mlp_layernorm", {}),
        (True, "decoder.layers.0.mlp.linear_fc2.post_layernorm", {"norm": "post", "qk_norm": "whole"}),
        (True, "decoder.layers.1.self_attention.k_layernorm", {"qk_norm": "head"}),
        (False, "decoder.layers.0.self_attention.q_layernorm", {"qk_norm": "head"}),
        (False, "decoder.layers.1.self_attention.k_layernorm", {"norm": "post", "qk_norm": "whole"}),
    ],
)
def test_a_gradient_that_is_not_summed_once_is_found(sequence, where, options):
    for missing, twice in run_on_ranks(2, unsummed_gradients, sequence, where, options):
        assert f"{where}.weight: expected a gradient summed over the 2" in missing
        assert f"{where}.weight: expected a gradient summed over the 2" in twice


def pause_rows() -> dict:
    from pause_megatron.distributed import initialize
    from pause_megatron.model import parameter_groups

    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        model = tiny(parallel=parallel, pauses=3, tied=False, hidden=256, heads=4, init_std=0.5)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {
            g["name"]: ([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in parameter_groups(model, 0.1)
        }
        assert sum(
            p[: TEXT_SIZE + 3].numel() if "word_emb" in n or "output_layer" in n else p.numel()
            for n, p in model.named_parameters()
        ) == parameters(check_shape(section(tied=False, hidden=256), parallel, SEQ), TEXT_SIZE + 3)
        return {
            "embedding": model.embedding.word_embeddings.weight.detach().clone(),
            "output": model.output_layer.weight.detach().clone(),
            "groups": groups,
            "parallel": {n: getattr(p, "tensor_model_parallel", False) for n, p in model.named_parameters()},
            "state": list(model.state_dict()),
        }


def test_pause_rows_are_live_distinct_and_never_decay():
    (found,) = run_on_ranks(1, pause_rows)
    for matrix in (found["embedding"], found["output"]):
        text, pauses, padding = matrix[:TEXT_SIZE], matrix[TEXT_SIZE : TEXT_SIZE + 3], matrix[TEXT_SIZE + 3 :]
        assert float(pauses.std()) == pytest.approx(float(text.std()), rel=0.1)
        assert not torch.equal(pauses[0], pauses[1])
        assert padding.shape[0] and not padding.any()
    assert not torch.equal(found["embedding"], found["output"])
    decay, amount = found["groups"]["decay"]
    assert amount == 0.1 and all(".linear_" in name for name in decay) and len(decay) == 8
    rest, amount = found["groups"]["no_decay"]
    assert amount == 0.0 and {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(rest)
    assert found["parallel"] == {name: "norm" not in name for name in found["parallel"]}
    assert not any("_extra_state" in key for key in found["state"])


def test_vocabulary():
    vocabulary = Vocabulary(50, (50, 51))
    assert (vocabulary.size, vocabulary.padded(4, 1), vocabulary.padded(4, 4), vocabulary.padded(1, 2)) == (
        52,
        52,
        64,
        52,
    )
    assert vocabulary.masked_columns("keep", 0, 64) == [(52, 64)]
    assert vocabulary.masked_columns("exclude", 0, 64) == [(50, 64)]
    assert vocabulary.masked_columns("exclude", 48, 52) == [(2, 4)]
    assert vocabulary.masked_columns("exclude", 0, 32) == []
    assert Vocabulary(50, (7,)).masked_columns("exclude", 0, 64) == [(7, 8), (50, 64)]
    for pauses in ((3, 3), (-1,)):
        with pytest.raises(ConfigError, match="pause ids"):
            Vocabulary(50, pauses)


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({"layers": None}, {}, "model.layers: expected a value"),
        ({"hidden": 36}, {}, "expected an even head size .*; got model.hidden=36, model.heads=4$"),
        ({"kv_heads": 3}, {}, "expected model.heads to be a multiple of model.kv_heads; got model.heads=4, "),
        (
            {"heads": 12, "hidden": 48, "kv_heads": 6},
            {"tensor": 4},
            "model.kv_heads to be a multiple or a divisor of parallel.tensor; got model.kv_heads=6, parallel.tensor=4$",
        ),
        ({"ffn": 50}, {"tensor": 4}, "expected model.ffn to be a multiple of parallel.tensor"),
        ({}, {"sequence": True}, "expected parallel.tensor > 1 with parallel.sequence"),
        ({}, {"tensor": 2, "sequence": True}, "data.sequence_length to be a multiple of parallel.tensor"),
    ],
)
def test_sizes_that_cannot_be_split(changes, parallel, message):
    with pytest.raises(ConfigError, match=message):
        check_shape(section(**changes), ParallelSection(**parallel), SEQ - 1)


def test_transformer_engine_is_asked_for_by_name():
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        message = r"model\.attention: expected Transformer Engine to be installed for 'te'"
        with pytest.raises(ConfigError, match=message):
            block_spec(2, attention="te")
    else:
        block_spec(2, attention="te")
