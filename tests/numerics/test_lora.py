"""LoRA adapters against plain PyTorch: the weights W + scale B A under autograd, at any tensor parallelism."""

from __future__ import annotations

import math

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_model import SEQ, batch, distance, loss_of, section, take_gradients, tiny, whole
from torch import Tensor
from torch.func import functional_call

from pause_megatron.checkpoint.layout import partition_dim, row_spans
from pause_megatron.config.load import load
from pause_megatron.config.lora import trained_parameters
from pause_megatron.config.model_schema import LoraSection
from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.model.decay import decays
from pause_megatron.plan.shapes import rank_parameters

LORA = LoraSection(rank=3, alpha=12.0)
SOME = LoraSection(rank=2, targets=("proj", "fc1"), layers="1")
CASES = {
    "all": (LORA, {}, "none"),
    "grouped queries, recomputed": (LORA, {"kv_heads": 2, "tied": False}, "full"),
    "looped": (LORA, {"loops": 2}, "none"),
    "a looped layer, another adapted": (SOME, {"loops": 3, "loop_layers": "0..0"}, "full"),
    "norms of outputs, as in OLMo 2": (LORA, {"norm": "post", "qk_norm": "whole"}, "full"),
    "one key head, biases": (LORA, {"kv_heads": 1, "qkv_bias": True, "proj_bias": True, "mlp_bias": True}, "none"),
    "one layer": (SOME, {"qkv_bias": True}, "none"),
}


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_a", ".lora_b"))


def fill(model: torch.nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
    """Give each B random values, the same whole matrix at any tensor parallelism; return the fresh A."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith(".lora_b"):
                assert not parameter.any()
                assert (partition_dim(name) == 0) == getattr(parameter, "tensor_model_parallel", False)
                rows = parameter.shape[0] * (ranks if partition_dim(name) == 0 else 1)
                drawn = torch.randn(rows, parameter.shape[1], generator=torch.Generator().manual_seed(number)) / 20
                spans = [span for span in row_spans(name, rows, ranks) if span.rank == rank or len(drawn) == span.count]
                parameter.copy_(torch.cat([drawn[s.start : s.start + s.count] for s in spans]))
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".lora_a")}


def adapted_gradients(tensor: int, sequence: bool) -> dict[str, tuple]:
    """For each case: whether the fresh model computes what the base does, A, the loss, and all gradients, merged."""
    from pause_megatron.distributed import initialize

    found = {}
    with initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu") as context:
        for case, (lora, options, recompute) in CASES.items():
            parallel = ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute)
            base, model = tiny(parallel=parallel, **options), tiny(parallel=parallel, lora=lora, **options)
            check_named_as_planned(model, lora, options, tensor)
            group, data = model.pg_collection.tp, batch(0.7)
            same = torch.equal(*(loss_of(each, data).loss for each in (base, model)))
            low = whole_of(model, fill(model, context.tp_rank, context.tp_size), group)
            loss = loss_of(model, data).loss
            loss.backward()
            found[case] = (same, low, loss.item(), whole(model, take_gradients(model), group))
    return found


def check_named_as_planned(model: torch.nn.Module, lora: LoraSection, options: dict, tensor: int) -> None:
    """`plan` counts these parameters."""
    sizes = check_shape(section(**options), ParallelSection(tensor=tensor), SEQ)
    planned = {one.name: one for one in rank_parameters(sizes, model.vocabulary.size, tensor, lora)}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: one.shape for name, one in planned.items()
    }
    for name, parameter in model.named_parameters():
        assert planned[name].replicated != getattr(parameter, "tensor_model_parallel", False), name
        assert planned[name].decays == decays(parameter), name
    config = load(overrides=["train.only=lora", "pause.rate=0"])
    config = config.model_copy(update={"model": sizes, "lora": lora})
    added = sum(math.prod(shape) for name, shape in merged_shapes(model, tensor).items() if is_adapter(name))
    assert trained_parameters(config) == added + (1 if sizes.tied else 2) * sizes.hidden
    assert [name for name in planned if is_adapter(name)] == [n for n, _ in model.named_parameters() if is_adapter(n)]


def merged_shapes(model: torch.nn.Module, tensor: int) -> dict[str, list[int]]:
    return {
        name: [n * tensor if d == partition_dim(name) else n for d, n in enumerate(parameter.shape)]
        for name, parameter in model.named_parameters()
    }


def whole_of(model: torch.nn.Module, shards: dict[str, Tensor], group) -> dict[str, Tensor]:
    every = {name: shards.get(name, p.detach()) for name, p in model.named_parameters()}
    return {name: value for name, value in whole(model, every, group).items() if name in shards}


def plain_gradients() -> dict[str, tuple[float, dict[str, Tensor]]]:
    """The same loss and gradients from the base model with the weights W + scale B A, composed by torch."""
    from pause_megatron.distributed import initialize

    found = {}
    with initialize(ParallelSection(), device="cpu"):
        for case, (lora, options, _) in CASES.items():
            base, model = (tiny(parallel=ParallelSection(), lora=each, **options) for each in (None, lora))
            fill(model, 0, 1)
            leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
            weights = {name: value for name, value in leaves.items() if not is_adapter(name)}
            for name in [name for name in leaves if name.endswith(".lora_a")]:
                matrix = name.removesuffix("lora_a")
                product = leaves[f"{matrix}lora_b"] @ leaves[name]
                weights[f"{matrix}weight"] = leaves[f"{matrix}weight"] + lora.alpha / lora.rank * product
            assert weights.keys() == dict(base.named_parameters()).keys()
            assert len(leaves) - len(weights) == (16 if lora is LORA else 4)
            data = batch(0.7)
            arguments = dict(target_rows=data["rows"], targets=data["targets"], loss_scale=1.0)
            loss = functional_call(base, weights, (data["tokens"], data["position_ids"]), arguments).loss
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            found[case] = (loss.item(), dict(zip(leaves, gradients, strict=True)))
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[float, dict[str, Tensor]]]:
    (found,) = run_on_ranks(1, plain_gradients)
    return found


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_the_loss_and_its_gradients_are_those_of_plain_torch(plain, tensor, sequence):
    (alone,) = run_on_ranks(1, adapted_gradients, 1, False)
    for found in run_on_ranks(tensor, adapted_gradients, tensor, sequence):
        for case, (same, low, loss, gradients) in found.items():
            expected_loss, expected = plain[case]
            live = {name: value[: len(gradients[name])] for name, value in expected.items()}  # without padding rows
            assert same, f"{case}: a fresh adapter changes the loss"
            assert all(torch.equal(value, alone[case][1][name]) for name, value in low.items()), case
            assert loss == pytest.approx(expected_loss, rel=1e-5), case
            assert distance(gradients, live) < 2e-5, case
