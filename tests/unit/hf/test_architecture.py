"""config.json is read as transformers reads it, key by key, also where one is missing; the rest is refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from pause_megatron.config.families import FAMILIES
from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.hf.architecture import check_readable, config_json, read_architecture
from pause_megatron.model.rotary import attention_factor, inverse_frequencies

# Sizes that differ from every class's defaults, so that a key read as the wrong default shows.
SIZES = {
    **{"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-3},
    **{"rope_theta": 777.0, "initializer_range": 0.1, "tie_word_embeddings": True, "hidden_act": "silu"},
}
OWN = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3, "head_dim": 16},
    "olmo2": {"attention_bias": True},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 2.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16},
    "llama3, original length from the positions": LLAMA3,
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, null factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "yarn, original length from the positions": {"rope_type": "yarn", "factor": 4.0},
    "yarn, null options": {"rope_type": "yarn", "factor": 4, "attention_factor": None, "beta_fast": None},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7},
    "yarn, bounds": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
}


def written(family: str, layout: str, **changes: object) -> dict:
    """config.json of a small model, as transformers 5 writes it ("new") or as most folders of the Hub have it."""
    import transformers

    cls = FAMILIES[family].architecture.replace("ForCausalLM", "Config")
    config = json.loads(getattr(transformers, cls)(**SIZES, **OWN[family]).to_json_string(use_diff=False))
    config["architectures"] = [FAMILIES[family].architecture]
    if layout == "old":
        del config["rope_parameters"]
        config.pop("layer_types", None)
        config |= {"rope_theta": SIZES["rope_theta"], "rope_scaling": None}
    return config | changes


def theirs(config: dict) -> dict:
    """What transformers makes of it, in terms of the native model."""
    from transformers import AutoConfig

    read = AutoConfig.for_model(**config)
    flag = getattr(read, "attention_bias", False)
    return {
        **{"layers": read.num_hidden_layers, "hidden": read.hidden_size, "heads": read.num_attention_heads},
        **{"kv_heads": read.num_key_value_heads, "ffn": read.intermediate_size, "norm_eps": read.rms_norm_eps},
        **{"rope_base": read.rope_parameters["rope_theta"], "tied": read.tie_word_embeddings},
        **{"qkv_bias": flag or read.model_type == "qwen2", "proj_bias": flag},
        **{"mlp_bias": getattr(read, "mlp_bias", False), "init_std": read.initializer_range},
        "channels": getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads,
    }


def windows_of(config: dict) -> list[int | None]:
    """The sliding window of each layer, as the modeling code of transformers takes it."""
    from transformers import AutoConfig

    read = AutoConfig.for_model(**config)
    kinds = getattr(read, "layer_types", None) or ["sliding_attention"] * read.num_hidden_layers
    window = getattr(read, "sliding_window", None) if read.model_type in ("mistral", "qwen2", "qwen3") else None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rope_of(config: dict) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and factor of cosines and sines of transformers' own rotary embedding."""
    import transformers
    from transformers import AutoConfig

    read = AutoConfig.for_model(**config)
    name = FAMILIES[read.model_type].architecture.replace("ForCausalLM", "RotaryEmbedding")
    module = getattr(getattr(transformers.models, read.model_type), f"modeling_{read.model_type}")
    rope = getattr(module, name)(read)
    return rope.inv_freq, rope.attention_scaling


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_missing_is_read_as_transformers_reads_it(family, layout):
    whole = written(family, layout)
    refused, read = {}, set()
    for key in [None, *whole]:
        config = {name: value for name, value in whole.items() if name != key}
        try:
            found = read_architecture(config, "config.json")
        except CheckpointError as error:
            refused[key] = str(error)
            continue
        expected = theirs(config)
        assert {name: getattr(found.model, name) for name in expected} == expected, f"without {key}"
        assert [found.model.window_of(n) for n in range(found.model.layers)] == windows_of(config), f"without {key}"
        assert found.model.family == family
        read.add(key)
    assert None in read
    sizes = {"model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"}
    # Its layer types then ask for windows that transformers has no size of: it fails with the first token.
    sizes |= {"use_sliding_window"} if layout == "new" else set()
    assert set(refused) <= sizes, refused


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_is_read_as_transformers_reads_it_or_refused(family):
    whole = written(family, "old")
    for key in whole:
        config = {**whole, key: None}
        try:
            found = read_architecture(config, "config.json")
            check_readable(config, FAMILIES[family], "config.json")
        except CheckpointError as error:
            assert str(error).startswith("config.json: ") and key in str(error) and "\n" not in str(error)
            continue
        expected = theirs(config)
        assert {name: getattr(found.model, name) for name in expected} == expected, f"{key}: null"
        assert [found.model.window_of(n) for n in range(found.model.layers)] == windows_of(config), f"{key}: null"


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("layout", ["new", "old", "beside"])
def test_rotary_angles_are_those_of_transformers_in_and_out(name, layout):
    config = written("llama", "old")
    if layout == "new":
        del config["rope_scaling"], config["rope_theta"]
        config["rope_parameters"] = {**ROPES[name], "rope_theta": 777.0}
    else:
        config["rope_scaling"] = dict(ROPES[name])
    if layout == "beside":  # transformers prefers this place to the one in the group
        config["original_max_position_embeddings"] = 32
    found = read_architecture(json.loads(json.dumps(config)), "config.json")
    back = out(found)
    without = {key: value for key, value in back.items() if key != "rope_parameters"}
    for each in (config, back, without):
        frequencies, factor = rope_of(json.loads(json.dumps(each)))
        torch.testing.assert_close(inverse_frequencies(found.model), frequencies, rtol=1e-6, atol=0)
        assert attention_factor(found.model) == pytest.approx(factor, rel=1e-12)


def out(found) -> dict:
    """The config.json of an export of what was read."""
    return config_json(
        found.model,
        family=FAMILIES[found.family],
        live_rows=found.rows,
        sequence_length=found.sequence_length,
        dtype="fp32",
        special_ids={"eos": 2, "bos": 1},
        pause={"ids": [599]},
    )


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "yarn, attention factor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_config_of_its_source(family, rope):
    """As transformers reads both, key by key; also without the keys that only transformers 5 reads."""
    from transformers import AutoConfig

    source = written(family, "old", bos_token_id=1, eos_token_id=2, pad_token_id=None, rope_scaling=dict(ROPES[rope]))
    back = out(read_architecture(json.loads(json.dumps(source)), "config.json"))
    older = {key: value for key, value in back.items() if key != "rope_parameters"}
    expected = AutoConfig.for_model(**json.loads(json.dumps(source))).to_dict()
    for written_back in (back, older):
        got = AutoConfig.for_model(**json.loads(json.dumps(written_back))).to_dict()
        for config in (expected, got):
            for key in ("pause", "dtype"):
                config.pop(key, None)
            config["rope_parameters"] = {
                key: value
                for key, value in config["rope_parameters"].items()
                if (key, value) not in {("beta_fast", 32.0), ("beta_slow", 1.0)} and key != "type"
            }
        assert got == expected


@pytest.mark.parametrize(
    ("kinds", "window", "first"),
    [
        ("ffff", 32, None),
        ("fsss", 32, 1),
        ("ssss", 32, 0),
        ("fffs", 32, 3),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layer_types_come_before_max_window_layers(family, kinds, window, first):
    names = {"f": "full_attention", "s": "sliding_attention"}
    config = written(family, "old", layer_types=[names[kind] for kind in kinds], max_window_layers=2)
    model = read_architecture(config, "x").model
    assert [model.window_of(layer) for layer in range(4)] == windows_of(config)
    assert (model.sliding_window, model.sliding_from) == ((None, 0) if first is None else (window, first))


@pytest.mark.parametrize("positions", [4096, 8192])
def test_a_mistral_without_the_window_key_has_one_of_4096(positions):
    config = written("mistral", "old") | {"max_position_embeddings": positions}
    del config["sliding_window"]
    assert windows_of(config) == [4096] * 4
    assert read_architecture(config, "x").model.sliding_window == 4096
    assert read_architecture(config, "x", 2048).sequence_length == 2048
    assert read_architecture(config | {"sliding_window": None}, "x").model.sliding_window is None


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"head_dim": 15}, r"head_dim: expected an even number .*, got '15'"),
        ("qwen3", {"head_dim": None}, r"head_dim: expected a whole number, or no such key"),
        ("llama", {"hidden_size": 60}, r"hidden_size: expected a multiple of num_attention_heads = 8, got '60'"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 0.5}}, r"rope_scaling: factor: expected a number of at least 1"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"low_freq_factor: .* got no such key"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, r"low_freq_factor: expected less than high_freq"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters: factor: expected .*, got no such key"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"type: expected default, .*, got 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, r"rope_type: expected default, .*, got 'longrope'"),
        ("llama", {"rope_scaling": {"rope_type": "proportional"}}, r"rope_type: expected .*, got 'proportional'"),
        ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type: expected default, .*, got \"\['yarn'\]\""),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor: expected 1 or None"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1 or None, got '0\.5'"),
        ("llama", {"rope_theta": None}, r"rope_theta: expected a number above 0, got 'None'"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"expected one group of keys for all"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act: expected 'silu' or 'swish', got 'gelu'"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads: expected a divisor of .* = 8, got '3'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, r"layer_types: expected one type for each of .* = 4"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            r"layer_types: expected full_attention up to some layer and sliding_attention from it on",
        ),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            r"layer_types: expected full_attention in every layer, without a sliding window",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, r"layer_types: .*chunked_attention"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, r"layer_types: expected sliding_attention in every layer"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, r"layer_types: expected full_attention in every layer"),
        ("llama", {"model_type": "qwen3_moe"}, r"model_type: expected one of llama, qwen2, .*, got 'qwen3_moe'"),
        ("llama", {"model_type": None}, r"model_type: expected one of llama, .*, got 'None'"),
        ("llama", {"model_type": ["llama"]}, r"model_type: expected one of llama, "),
        ("olmo2", {"clip_qkv": 8.0}, r"clip_qkv: expected no such key \(Olmo2ForCausalLM of transformers does not"),
        ("llama", {"logits_scaling": 8.0}, r"logits_scaling: expected no such key"),
        ("llama", {"no_rope_layers": [1, 0]}, r"no_rope_layers: expected no such key"),
        ("llama", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping: expected no such key"),
        ("llama", {"embedding_multiplier": 12.0}, r"embedding_multiplier: expected no such key"),
        ("llama", {"norm_type": "layernorm"}, r"norm_type: expected no such key"),
        ("qwen3", {"num_experts": 8}, r"num_experts: expected no such key"),
        ("llama", {"use_qk_norm": True}, r"use_qk_norm: expected no such key"),
        ("llama", {"per_layer_config": {"0": {"hidden_size": 8}}}, r"per_layer_config: expected no such key"),
    ],
)
def test_what_is_not_supported_names_its_key_and_value(family, changes, expected):
    with pytest.raises(CheckpointError, match=r"config\.json: (rope_\w+: )?" + expected) as caught:
        read_architecture(written(family, "old") | changes, "config.json")
    assert "\n" not in str(caught.value)


def test_keys_without_effect_are_read_over():
    """As folders of the Hub have them: of other programs, of training, and neutral values."""
    extra = {"rope_interleaved": False, "is_llama_config": True, "clip_qkv": None, "unsloth_fixed": True}
    extra |= {"transformers.js_config": {"dtype": "q4"}, "use_mrope": False, "logits_scaling": 1.0, "num_experts": 0}
    extra |= {"pretraining_tp": 1, "max_window_layers": 21, "torch_dtype": "bfloat16", "_name_or_path": "x"}
    config = written("llama", "old")
    assert read_architecture(config | extra, "x").model == read_architecture(config, "x").model


def test_key_value_heads_that_ranks_cannot_share_name_the_file_and_the_option():
    from pause_megatron.hf.imported import imported_config

    def imported(read, tensor_parallel: int) -> None:
        imported_config(
            read.model,
            where="x/config.json",
            sequence_length=read.sequence_length,
            embeddings=1,
            tensor_parallel=tensor_parallel,
            precision="bf16",
        )

    config = written("llama", "old", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    message = r"got model\.kv_heads=3 \(x/config\.json\), parallel\.tensor=2 \(--tensor-parallel\)"
    with pytest.raises(ConfigError, match=message):
        imported(read_architecture(config, "x"), 2)
    imported(read_architecture(written("llama", "old"), "x"), 8)
