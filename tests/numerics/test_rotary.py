"""Rescaled rotary angles are those of transformers, bit for bit, with its factor of cosines and sines."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.random_families import hf_config, resolved

from pause_megatron.config.model_schema import ModelSection
from pause_megatron.config.schema import ParallelSection
from pause_megatron.model.rotary import attention_factor, inverse_frequencies

GRID = {
    None: [{}],
    "linear": [{"rope_factor": factor} for factor in (1.0, 2.5, 8.0)],
    "llama3": [
        {"rope_factor": factor, "rope_original_length": length, "rope_low_freq": low, "rope_high_freq": high}
        for factor, length, (low, high) in itertools.product(
            (1.0, 8.0, 32.0), (12, 8192), ((1.0, 4.0), (0.5, 2.0), (3.0, 3.5))
        )
    ],
    "yarn": [
        {
            **{"rope_factor": factor, "rope_original_length": length, "rope_beta_slow": slow, "rope_beta_fast": fast},
            **{"rope_truncate": truncate, "rope_attention_factor": attention},
        }
        for factor, length, (slow, fast), truncate, attention in itertools.product(
            (1.0, 4.0, 40.0), (12, 4096, 32768), ((1.0, 32.0), (0.001, 0.002), (1.0, 2.5)), (True, False), (None, 1.7)
        )
    ],
}


@pytest.mark.parametrize("kind", GRID)
def test_angles_are_those_of_transformers(kind):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for options, channels, base in itertools.product(GRID[kind], (2, 10, 64, 128), (10000.0, 500000.0, 1e6)):
        section = ModelSection(
            **{
                "preset": None,
                "layers": 1,
                "hidden": 32,
                "heads": 2,
                "kv_heads": 2,
                "ffn": 36,
                "head_dim": channels,
                "tied": True,
            },
            **{"rope_base": base, "rope_scaling": kind, "family": "llama", **options},
        )
        model = resolved(section, ParallelSection())
        theirs = LlamaRotaryEmbedding(hf_config(model))  # by its rope_type, from ROPE_INIT_FUNCTIONS
        assert torch.equal(inverse_frequencies(model), theirs.inv_freq), (options, channels, base)
        assert attention_factor(model) == theirs.attention_scaling
