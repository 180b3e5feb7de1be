"""config.json is read as transformers reads it, key by key, also where one is missing; the rest is refused by name."""

from __future__ import annotations

import json

import pytest

from pause_megatron.config.families import FAMILIES
from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.hf.architecture import read_architecture

# Sizes that differ from every class's defaults, so that a key read as the wrong default shows.
SIZES = {
    **{"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-3},
    **{"rope_theta": 777.0, "initializer_range": 0.1, "tie_word_embeddings": True, "hidden_act": "silu"},
}
OWN = {
    "llama": {"attention_bias": True, "mlp_bias": False, "head_dim": 8},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "qwen2": {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1},
}


def written(family: str, layout: str) -> dict:
    """config.json of a small model, as transformers 5 writes it ("new") or as most folders of the Hub have it."""
    import transformers

    cls = FAMILIES[family].architecture.replace("ForCausalLM", "Config")
    config = json.loads(getattr(transformers, cls)(**SIZES, **OWN[family]).to_json_string(use_diff=False))
    config["architectures"] = [FAMILIES[family].architecture]
    if layout == "old":
        del config["rope_parameters"]
        config.pop("layer_types", None)
        config |= {"rope_theta": SIZES["rope_theta"], "rope_scaling": None}
    return config


def theirs(config: dict) -> dict:
    """What transformers makes of it, in terms of the native model."""
    from transformers import AutoConfig

    read = AutoConfig.for_model(**config)
    biases = True if read.model_type == "qwen2" else getattr(read, "attention_bias", False)
    return {
        **{"layers": read.num_hidden_layers, "hidden": read.hidden_size, "heads": read.num_attention_heads},
        **{"kv_heads": read.num_key_value_heads, "ffn": read.intermediate_size, "norm_eps": read.rms_norm_eps},
        **{"rope_base": read.rope_parameters["rope_theta"], "tied": read.tie_word_embeddings, "qkv_bias": biases},
        "init_std": read.initializer_range,
    }


def window_of(config: dict) -> int | None:
    from transformers import AutoConfig

    return getattr(AutoConfig.for_model(**config), "sliding_window", None)


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
        window = window_of(config)
        assert window is None or window >= found.sequence_length, f"without {key}"
        read.add(key)
    assert None in read
    sizes = {"model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"}
    assert set(refused) <= sizes | {"sliding_window"}, refused


@pytest.mark.parametrize("positions", [4096, 8192])
def test_a_mistral_without_the_window_key_has_one_of_4096(positions):
    config = written("mistral", "old") | {"max_position_embeddings": positions}
    del config["sliding_window"]
    assert window_of(config) == 4096
    assert read_architecture(config, "x", 4096).sequence_length == 4096
    if positions > 4096:
        with pytest.raises(CheckpointError) as caught:
            read_architecture(config, "x")
        message = "got 4096, the default of transformers for a missing key"
        assert message in str(caught.value) and "pass --sequence-length 4096" in str(caught.value)
    assert read_architecture(config | {"sliding_window": None}, "x").sequence_length == positions


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"head_dim": 16}, r"head_dim: expected None or 8, got '16'"),
        ("mistral", {"head_dim": 128}, r"head_dim: expected None or 8, got '128'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling: expected .*'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"rope_parameters: expected .*'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling: expected .*'dynamic'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters: expected .*0\.5"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1, got '0\.5'"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act: expected 'silu' or 'swish', got 'gelu'"),
        ("llama", {"mlp_bias": True}, r"mlp_bias: expected False, got 'True'"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads: expected a divisor of .* = 8, got '3'"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 32},
            r"sliding_window: expected null or at least 64 .*, got 32",
        ),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types: expected full_attention"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types: .*chunked_attention"),
        ("llama", {"model_type": "qwen3"}, r"model_type: expected one of llama, mistral, qwen2, got 'qwen3'"),
        ("llama", {"model_type": None}, r"model_type: expected one of llama, mistral, qwen2, got 'None'"),
    ],
)
def test_what_is_not_supported_names_its_key_and_value(family, changes, expected):
    with pytest.raises(CheckpointError, match=r"config\.json: " + expected):
        read_architecture(written(family, "old") | changes, "config.json")


def test_fewer_key_value_heads_than_tensor_parallel_ranks_name_both():
    from pause_megatron.hf.importing import _config

    with pytest.raises(ConfigError, match=r"parallel\.tensor.*8|kv_heads.*4"):
        _config(read_architecture(written("llama", "old"), "x"), 1, 8)
