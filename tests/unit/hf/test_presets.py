"""Presets of published models against transformers' models of the published config.json, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pause_megatron.config.families import families_of, layer_tensors
from pause_megatron.config.load import load
from pause_megatron.config.presets import PRESETS, parameters

# What each config.json of the Hub says where it differs from the class of transformers, and the model's parameters.
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "llama",
        1_235_814_400,
        {
            **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
            **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072},
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        596_049_920,
        {
            **{"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
            **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 40960},
        },
    ),
    "olmo2-1b": (
        "olmo2",
        1_484_916_736,
        {
            **{"vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False},
            **{"rms_norm_eps": 1e-6, "rope_theta": 500000, "max_position_embeddings": 4096},
        },
    ),
    "smollm2-135m": (
        "llama",
        134_515_008,
        {
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
            **{"rms_norm_eps": 1e-5, "rope_theta": 100000, "max_position_embeddings": 8192},
        },
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        494_032_768,
        {
            **{"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
            **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
            **{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768},
            **{"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
        },
    ),
    "mistral-7b": (
        "mistral",
        7_241_732_096,
        {
            **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
            **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "max_position_embeddings": 32768},
        },
    ),
}


def test_every_preset_with_options_is_compared():
    sizes = {"layers", "hidden", "heads", "ffn", "tied"}
    assert {name for name, preset in PRESETS.items() if preset.keys() - sizes} == set(PUBLISHED)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_the_published_model(preset):
    """Parameters by number and, in the layers, by name and shape; and every option that has no parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, count, written = PUBLISHED[preset]
    model = load(overrides=[f"model.preset={preset}"]).model
    config = AutoConfig.for_model(family, **written)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    head, embedding = theirs.lm_head.weight, theirs.model.embed_tokens.weight
    counted_twice = config.tie_word_embeddings and head is not embedding  # on meta, transformers 5.0 ties nothing
    own = theirs.num_parameters() - counted_twice * head.numel()
    assert own == parameters(model, config.vocab_size) == count
    prefix = "model.layers.0."
    shapes = {n.removeprefix(prefix): p.numel() for n, p in theirs.named_parameters() if n.startswith(prefix)}
    rows: dict[str, int] = {}
    for tensor in layer_tensors(model):
        for piece in tensor.pieces:
            rows[piece.name] = rows.get(piece.name, 0) + piece.count * tensor.numel // tensor.shape[0]
    assert rows == shapes
    assert families_of(model)[0].model_type == family
    rope = config.rope_parameters
    assert (model.norm_eps, model.rope_base) == (config.rms_norm_eps, rope["rope_theta"])
    assert model.channels == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert model.sliding_window == (config.sliding_window if family == "mistral" else None)
    scaled = rope["rope_type"] != "default"
    assert model.rope_scaling == (rope["rope_type"] if scaled else None)
    if scaled:
        assert (model.rope_factor, model.rope_original_length, model.rope_low_freq, model.rope_high_freq) == (
            *(rope["factor"], rope["original_max_position_embeddings"]),
            *(rope["low_freq_factor"], rope["high_freq_factor"]),
        )
