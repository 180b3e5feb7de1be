"""Batch, pause, parameter and FLOP arithmetic against numbers worked out by hand or by counting."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from pause_megatron.config.batching import batch_plan, positions
from pause_megatron.config.load import dump, load
from pause_megatron.config.model_schema import Preset
from pause_megatron.config.objective_rules import requests
from pause_megatron.config.pauses import PauseCounts, pauses_per_window
from pause_megatron.config.presets import PRESETS, attended_tokens, flops_per_token, parameters
from pause_megatron.errors import ConfigError


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_micro_x_accumulation_x_data_parallel_is_the_global_batch(ranks, tensor, micro):
    config = load(overrides=[f"parallel.tensor={tensor}", f"batch.micro_size={micro}", "batch.global_size=64"])
    if ranks % tensor:
        with pytest.raises(ConfigError, match=r"parallel\.tensor: expected a divisor of the number of ranks"):
            batch_plan(config, ranks)
        return
    plan = batch_plan(config, ranks)
    assert plan.micro_size * plan.accumulation * plan.data_parallel == plan.global_size == 64
    assert plan.data_parallel * plan.tensor == plan.world_size == ranks
    assert plan.raw_tokens == 64 * 2048


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    config = load(overrides=["batch.global_size=36", "batch.micro_size=4"])
    with pytest.raises(ConfigError, match=r"= 8\) = 32, got 36. Nearest: 32 or 64"):
        batch_plan(config, 8)
    with pytest.raises(ConfigError, match=r"got 36. Nearest: 64$"):
        batch_plan(config, 16)


@pytest.mark.parametrize(("objective", "rows"), [("cross_entropy", 58), ("anytime", 64), ("cyb_budget", 64)])
def test_an_objective_over_runs_has_the_rows_of_their_pauses_in_the_head(objective, rows):
    config = load(overrides=["data.sequence_length=64", "pause.run=2", f"objective={objective}"])
    plan = batch_plan(config, 1)
    assert (plan.target_rows, plan.targets) == (4 * rows, 32 * rows)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), 2),
        (("task.name=gsm8k", "finetune.pauses=0..10"), 10),
        (("task.name=gsm8k", "finetune.pauses=10", "finetune.answer_placement=uniform"), 2),
        (("objective=anytime",), None),
    ],
)
def test_requests_are_as_many_as_training_had_in_a_row_where_generation_grants_them(keys, expected):
    assert requests(load(overrides=["pause.run=2", "objective=cyb_anytime", *keys])) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["pause.run=3"], 64),
        (["pause.positions=shared"], 59),  # 65 tokens, of which 6 are pauses; the last one of them may be
        (["pause.positions=shared", "pause.window=trim"], 64),
        (["pause.positions=shared", "pause.rate=0"], 64),
        (["pause.positions=shared", "pause.placement=every"], 32),
        (["pause.positions=shared", "pause.placement=every", "pause.run=2"], 22),
        (["pause.positions=shared", "task.name=gsm8k", "finetune.pauses=5..10", "train.steps=1000"], 59),
    ],
)
def test_positions_of_a_window(keys, expected):
    assert positions(load(overrides=["data.sequence_length=64", *keys])) == expected


def test_the_papers_arithmetic():
    assert pauses_per_window(0.1, 2048) == 205
    trim, exact = (PauseCounts(2048, 0.1, window) for window in ("trim", "exact"))
    assert round(trim.input_fraction * 2048) == round(trim.expected) == 186
    assert trim.input_fraction == pytest.approx(0.091, abs=1e-4)
    assert exact.input_fraction == pytest.approx(0.1, abs=1e-4)
    assert (exact.expected, exact.text_length, trim.text_length) == (205, 2049 - 205, 2049)
    assert PauseCounts(2048, 0.0, "exact").input_fraction == 0


@pytest.mark.parametrize("window", ["exact", "trim"])
def test_expected_pause_fraction_is_the_mean_over_all_interleavings(window):
    """Enumerates every way of placing M pauses behind the first token of a window of N+1 (exact) or N+1+M (trim)."""
    from itertools import combinations

    length, pauses = 6, 3
    places = length + (pauses if window == "trim" else 0)
    ways = list(combinations(range(1, places + 1), pauses))
    inputs = [sum(place < length for place in way) for way in ways]
    kept = [sum(place <= length for place in way) for way in ways]
    counts = PauseCounts(length, pauses / length, window)
    assert counts.inserted == pauses
    assert counts.input_fraction == pytest.approx(sum(inputs) / len(ways) / length)
    assert counts.expected == pytest.approx(sum(kept) / len(ways))


# Vocabulary, and millions of parameters.
PRESET_SIZES = {"tiny": (8193, 1.90), "130m": (32001, 134.1), "1b": (32001, 1041.8), "7b": (32000, 6738.415616)}
# Of published models: vocabulary and parameters as transformers counts them (tests/unit/hf/test_presets.py).
PUBLISHED = {
    "llama-3.2-1b": (128256, 1_235_814_400),
    "qwen3-0.6b": (151936, 596_049_920),
    "olmo2-1b": (100352, 1_484_916_736),
    "smollm2-135m": (49152, 134_515_008),
    "qwen2.5-0.5b": (151936, 494_032_768),
    "mistral-7b": (32000, 7_241_732_096),
}


@pytest.mark.parametrize(("preset", "vocabulary", "millions"), [(name, *size) for name, size in PRESET_SIZES.items()])
def test_preset_sizes(preset, vocabulary, millions):
    model = load(overrides=[f"model.preset={preset}"]).model
    assert parameters(model, vocabulary) / 1e6 == pytest.approx(millions, abs=0.05)


def test_every_preset_is_tested():
    assert set(PRESETS) == set(PRESET_SIZES) | set(PUBLISHED) == set(get_args(Preset))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_of_published_models_have_their_parameters(preset):
    vocabulary, count = PUBLISHED[preset]
    assert parameters(load(overrides=[f"model.preset={preset}"]).model, vocabulary) == count


def test_a_given_key_wins_over_the_option_of_a_preset():
    given = {"head_dim": None, "qk_norm": None, "norm_eps": 1e-5, "rope_base": 10000.0, "tied": False}
    texts = [f"model.{name}={'null' if value is None else str(value).lower()}" for name, value in given.items()]
    model = load(overrides=["model.preset=qwen3-0.6b", *texts]).model
    assert {name: getattr(model, name) for name in given} == given
    assert (model.channels, model.kv_heads) == (64, 8)


def test_an_option_that_was_replaced_leaves_no_settings_of_the_preset_behind():
    model = load(overrides=["model.preset=llama-3.2-1b", "model.rope_scaling=null"]).model
    assert (model.rope_factor, model.rope_original_length, model.rope_base) == (1.0, None, 500000.0)
    assert load(overrides=["model.preset=mistral-7b", "model.sliding_window=null"]).model.sliding_window is None


def test_another_number_of_heads_does_not_keep_the_presets_key_value_heads():
    assert load(overrides=["model.preset=llama-3.2-1b", "model.heads=4"]).model.kv_heads == 4


@pytest.mark.parametrize("preset", PRESETS)
def test_a_later_preset_replaces_every_option_of_a_saved_configuration(preset, tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(load(overrides=["model.preset=qwen3-0.6b", "model.loops=2"])))
    assert load(saved).model == load(overrides=["model.preset=qwen3-0.6b", "model.loops=2"]).model
    expected = load(overrides=[f"model.preset={preset}", "model.loops=2"]).model
    assert load(saved, overrides=[f"model.preset={preset}"]).model == expected


def test_parameters_of_a_llama_2_7b():
    sizes = {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 11008}
    model = load(overrides=["model.preset=null", *(f"model.{name}={size}" for name, size in sizes.items())]).model
    assert parameters(model, 32000) == 6_738_415_616


def test_another_width_does_not_keep_the_width_of_the_presets_feed_forward():
    assert load(overrides=["model.preset=7b"]).model.ffn == 11008
    assert load(overrides=["model.preset=7b", "model.hidden=2048"]).model.ffn == 5504
    assert load(overrides=["model.preset=7b", "model.ffn=4096"]).model.ffn == 4096


def test_parameters_of_a_tinyllama_1_1b_with_grouped_queries():
    sizes = {"layers": 22, "hidden": 2048, "heads": 32, "kv_heads": 4, "ffn": 5632}
    model = load(overrides=["model.preset=null", *(f"model.{name}={size}" for name, size in sizes.items())]).model
    assert parameters(model, 32000) == 1_100_048_384


def test_flops_count_what_multiplies():
    model = load(overrides=["model.preset=130m"]).model
    table = 32001 * 768
    multiplied = parameters(model, 32001) - table
    assert flops_per_token(model, 32001, 2048) == 6 * multiplied + 12 * 12 * 768 * 2048
    tied = load(overrides=["model.preset=130m", "model.tied=true"]).model
    assert flops_per_token(tied, 32001, 2048) == flops_per_token(model, 32001, 2048)


def test_flops_of_attention_are_those_of_its_heads_and_windows():
    """Heads wider than hidden / heads, and layers that attend to a window's last tokens only."""
    given = ["model.preset=qwen3-0.6b", "data.sequence_length=512"]
    model = load(overrides=given).model
    multiplied = parameters(model, 100)  # tied: the one table is the output layer
    assert flops_per_token(model, 100, 512) == 6 * multiplied + 12 * 28 * (16 * 128) * 512
    short = load(overrides=[*given, "model.sliding_window=100", "model.sliding_from=20"]).model
    assert flops_per_token(short, 100, 512) == 6 * multiplied + 12 * (16 * 128) * (20 * 512 + 8 * 100)
    assert flops_per_token(short, 100, 64) == flops_per_token(model, 100, 64)
    looped = short.model_copy(update={"loops": 3})
    attention = 12 * (16 * 128) * (20 * 512 + 8 * 100)
    layers = multiplied - 101 * 1024
    assert flops_per_token(looped, 100, 512) == 6 * (3 * layers + 101 * 1024) + 3 * attention


def test_tokens_attended_to_are_counted_in_looped_and_sliding_layers():
    model = load(recipe="tiny-std").model
    for loops, range_of, window, first in product((1, 3), ("0..4", "1..3", "4"), (None, 3, 200), (0, 1, 2, 4)):
        sizes = {"layers": 5, "loops": loops, "loop_layers": range_of, "sliding_window": window, "sliding_from": first}
        each = model.model_copy(update=sizes)
        listed = [min(64, each.window_of(layer) or 64) for layer in each.order]
        assert attended_tokens(each, 64) == sum(listed), sizes
    many = model.model_copy(update={"layers": 10**9, "loops": 2})  # no list of them
    assert attended_tokens(many, 64) == 64 * 2 * 10**9
