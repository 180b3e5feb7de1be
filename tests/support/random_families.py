"""Random small configurations of every family, as transformers' own model and as the native model's sections."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from pause_megatron.config.families import FAMILIES, layer_tensors
from pause_megatron.config.model_schema import ModelSection, ResolvedModel
from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.hf.weights import EMBEDDING, HEAD, hf_tensors, native_rows, native_shapes

ROWS = 51
SEQ = 40
ORIGINAL = 12  # the window before the rotary angles were rescaled, which SEQ exceeds


def draw_section(family_name: str, seed: int, **fixed: object) -> ModelSection:
    """Options that the family has. Every number of ranks up to 4 divides the sizes."""
    draw = random.Random(f"{family_name} {seed}")
    family = FAMILIES[family_name]
    layers = draw.choice((2, 3))
    options: dict[str, Any] = {
        "preset": None,
        "family": family_name,
        "layers": layers,
        "hidden": draw.choice((32, 48)),
        "heads": draw.choice((4, 8)),
        "kv_heads": draw.choice((1, 2, 4)),
        "head_dim": draw.choice((None, 8, 10, 16)),
        "ffn": draw.choice((36, 64)),
        "tied": draw.random() < 0.5,
        "qk_norm": family.qk_norm,
        "norm": family.norm,
        "norm_eps": draw.choice((1e-6, 1e-5, 3e-2)),
        "rope_base": draw.choice((100.0, 10000.0, 500000.0)),
        "vocab_multiple": 4,
        "head_chunk": draw.choice((None, 7)),
        "mlp_bias": family.mlp_bias and draw.random() < 0.5,
    }
    if family.attention_bias == "flag":
        options["qkv_bias"], options["proj_bias"] = draw.choice(((False, False), (True, True), (True, False)))
    options["qkv_bias"] = family.attention_bias == "qkv" or options.get("qkv_bias", False)
    if family.sliding != "never" and draw.random() < 0.75:
        options["sliding_window"] = draw.choice((1, 3, 17, SEQ - 1, SEQ, SEQ + 5))
        options["sliding_from"] = draw.randrange(layers) if family.sliding == "from" else 0
    options["loops"] = 1 if options.get("sliding_from") else draw.choice((1, 1, 2))
    options |= _rope(draw)
    if options["loops"] > 1:
        options["loop_layers"] = draw.choice((None, "0..0", "1..1"))
    options |= fixed
    return ModelSection(**options | ({"loop_layers": None} if options["loops"] == 1 else {}))


def _rope(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice((None, "linear", "llama3", "yarn"))
    if kind is None:
        return {}
    options: dict[str, Any] = {"rope_scaling": kind, "rope_factor": draw.choice((1.0, 2.5, 8.0))}
    if kind != "linear":
        options["rope_original_length"] = ORIGINAL
    if kind == "llama3":
        options |= {"rope_low_freq": draw.choice((0.5, 1.0)), "rope_high_freq": draw.choice((2.0, 4.0))}
    if kind == "yarn":
        options |= {"rope_beta_fast": draw.choice((4.0, 32.0)), "rope_beta_slow": draw.choice((0.25, 1.0))}
        options |= {"rope_truncate": draw.random() < 0.5, "rope_attention_factor": draw.choice((None, 1.3))}
    return options


def resolved(section: ModelSection, parallel: ParallelSection) -> ResolvedModel:
    """The section with all sizes."""
    return check_shape(section, parallel, SEQ)


def rope_parameters(model: ResolvedModel) -> dict[str, Any]:
    """The entry of config.json, with the keys of its kind only."""
    entry: dict[str, Any] = {"rope_theta": model.rope_base, "rope_type": model.rope_scaling or "default"}
    if model.rope_scaling is not None:
        entry["factor"] = model.rope_factor
    if model.rope_original_length is not None:
        entry["original_max_position_embeddings"] = model.rope_original_length
    if model.rope_scaling == "llama3":
        entry |= {"low_freq_factor": model.rope_low_freq, "high_freq_factor": model.rope_high_freq}
    if model.rope_scaling == "yarn":
        entry |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        entry |= {"truncate": model.rope_truncate, "attention_factor": model.rope_attention_factor}
    return entry


def hf_config(model: ResolvedModel) -> Any:
    """The same options in the words of transformers."""
    import transformers

    family = FAMILIES[model.family or "llama"]
    config = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))
    options: dict[str, Any] = {"attention_bias": model.qkv_bias} if family.attention_bias == "flag" else {}
    if family.mlp_bias:
        options["mlp_bias"] = model.mlp_bias
    if family.sliding != "never":
        options["sliding_window"] = model.sliding_window
    if family.sliding == "from":
        options |= {
            "use_sliding_window": model.sliding_window is not None,
            "max_window_layers": model.unrolled().sliding_from,
        }
    return config(
        vocab_size=ROWS,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.channels,
        max_position_embeddings=SEQ,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied,
        rope_parameters=rope_parameters(model),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )


def hf_model(model: ResolvedModel, seed: int) -> Any:
    """transformers' model with random weights, biases and norms. Layers of a loop are equal, absent biases zero."""
    import transformers

    family = FAMILIES[model.family or "llama"]
    theirs = getattr(transformers, family.architecture)(hf_config(model)).eval()
    generator = torch.Generator().manual_seed(seed)
    zeros = family.zero_biases(model)
    drawn: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            key = name
            if name.startswith("model.layers."):
                number, _, rest = name.removeprefix("model.layers.").partition(".")
                key = f"{model.order[int(number)]}.{rest}"
            if key not in drawn:
                value = torch.randn(parameter.shape, generator=generator)
                drawn[key] = 1 + 0.3 * value if "norm" in name else 0.15 * value
            parameter.copy_(torch.zeros_like(parameter) if name.endswith(zeros or ("\n",)) else drawn[key])
    return theirs


def native_shards(
    model: ResolvedModel, tensors: dict[str, Tensor], padded_rows: int, rank: int, ranks: int
) -> dict[str, Tensor]:
    """This rank's part of every native parameter, or of its gradient: copies of a looped layer are added up."""
    splits = {
        f"decoder.layers.{layer}.{tensor.name}": tensor.split
        for layer in range(model.layers)
        for tensor in layer_tensors(model)
    }
    splits |= {EMBEDDING: 0, HEAD: 0}
    shapes = native_shapes(model, padded_rows)
    result = {}
    for name, pieces in native_rows(hf_tensors(model, ROWS)).items():
        whole = torch.zeros(shapes[name])
        for piece in pieces:
            part = tensors[piece.name][piece.start : piece.start + piece.count]
            whole[piece.native : piece.native + piece.count] += part
        result[name] = _part(name, whole, splits.get(name), rank, ranks)
    return result


def _part(name: str, whole: Tensor, split: int | None, rank: int, ranks: int) -> Tensor:
    if split is None:
        return whole
    if ".linear_fc1." in name:
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim=split)[rank]
