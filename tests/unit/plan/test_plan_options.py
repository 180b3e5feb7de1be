"""Options of a model in a plan: presets of published models, and every tensor of a layer at its place."""

from __future__ import annotations

from typing import get_args

import pytest

from pause_megatron.config.load import load
from pause_megatron.config.model_schema import PublishedPreset
from pause_megatron.config.presets import parameters
from pause_megatron.plan.activations import activations
from pause_megatron.plan.communication import step_traffic
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.live import live_parameters
from pause_megatron.plan.reductions import reductions
from pause_megatron.plan.work import step_work

ALL_BIASES = tuple(f"model.{name}_bias=true" for name in ("qkv", "proj", "mlp"))
OPTIONS = {
    "biases": ALL_BIASES,
    "qk norm": ("model.qk_norm=head", "model.qkv_bias=true", "model.proj_bias=true"),
    "adapters": (*ALL_BIASES, "train.only=lora", "lora.layers=1..2", "lora.targets=[qkv,fc2]"),
    "post norms": ("model.qk_norm=whole", "model.norm=post"),
}


def layout_of(*overrides: str, ranks: int = 8) -> Layout:
    return Layout.of(load(overrides=overrides), ranks, 1000)


@pytest.mark.parametrize("preset", get_args(PublishedPreset))
@pytest.mark.parametrize("loops", [1, 2])
def test_a_published_model_has_a_plan(preset, loops):
    layout = layout_of(f"model.preset={preset}", f"model.loops={loops}", "model.vocab_multiple=1")
    assert layout.numel == parameters(layout.model, layout.vocabulary)
    assert step_work(layout).layers.products == loops * step_work(layout_of(f"model.preset={preset}")).layers.products


@pytest.mark.parametrize("name", OPTIONS)
def test_every_tensor_of_a_layer_is_gathered_and_reduced(name):
    """Stage 3 gathers each parameter, and a backward pass reduces each gradient: none is left out by its name."""
    partitioned = ("engine.zero_stage=3", "engine.ds_config=zero3", "batch.global_size=64")
    layout = layout_of(*OPTIONS[name], *partitioned)
    live = live_parameters(layout)
    assert live.gathered_numel + live.persistent_numel >= layout.partitioned_numel
    assert reductions(layout, activations(layout, "cuda"), 10**9)[-1].done == layout.numel


def test_ranks_that_share_key_value_heads_keep_and_send_all_of_the_gathered_output():
    given = ("parallel.tensor=4", "model.heads=8", "batch.micro_size=1")
    apart, shared = (layout_of(*given, f"model.kv_heads={heads}") for heads in (4, 2))
    whole = 2 * 2048 * (8 + 2 * 2) * 16  # bf16, all heads
    assert {t.operation: t.bytes for t in step_traffic(shared) if t.purpose == "queries, keys and values"} == {
        operation: 4 * shared.batch.accumulation * whole for operation in ("all_gather", "reduce_scatter")
    }
    assert not any(t.purpose == "queries, keys and values" for t in step_traffic(apart))
    kept = activations(shared, "cuda").attention - activations(apart, "cuda").attention
    assert kept == whole - 2 * 2048 * (8 + 2 * 4) * 16 // 4


def test_a_sliding_window_costs_the_pairs_of_tokens_that_it_leaves():
    whole, sliding = (layout_of(f"model.sliding_window={size}") for size in (2048, 512))
    assert step_work(sliding).layers.attention / step_work(whole).layers.attention == (2 * 2048 - 512) * 512 / 2048**2
    some = layout_of("model.sliding_window=512", "model.sliding_from=3", "model.qkv_bias=true")
    expected = (3 * step_work(whole).layers.attention + step_work(sliding).layers.attention) // 4
    assert step_work(some).layers.attention == expected
    assert activations(sliding, "cpu").run_buffers == 2 * 2048**2 > activations(sliding, "cuda").run_buffers == 0
