"""Sizes and options of models by name, and their parameters and FLOPs."""

from __future__ import annotations

from typing import Any

from pause_megatron.config.families import layer_tensors
from pause_megatron.config.model_schema import ModelSection, ResolvedModel
from pause_megatron.errors import ConfigError

# Parameters are for the vocabulary in brackets, one <pause> included.
PRESETS: dict[str, dict[str, Any]] = {
    # 1.90 M [8193]. A CPU trains it in minutes. Tied, because the vocabulary would outweigh the layers.
    "tiny": {"layers": 4, "hidden": 128, "heads": 4, "tied": True},
    # 134.1 M [32001]: 84.9 M in the layers, 49.2 M in embedding and head. The paper's smaller model has 130 M.
    "130m": {"layers": 12, "hidden": 768, "heads": 12, "tied": False},
    # 1.042 G [32001]: 0.911 G in the layers. The paper's larger model has 1 G; heads of 128 and a width that
    # tensor parallelism over 2, 4, 8 or 16 ranks divides were preferred to its depth.
    "1b": {"layers": 18, "hidden": 2048, "heads": 16, "tied": False},
    # 6.738 G [32001]: the sizes of Llama 2 7B (Touvron et al. 2023), for comparison with published figures.
    "7b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 11008, "tied": False},
    # Published models, by the config.json of each.
    # 1,235,814,400 [128256]: meta-llama/Llama-3.2-1B.
    "llama-3.2-1b": {
        **{"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "tied": True},
        **{"rope_base": 500000.0, "rope_scaling": "llama3", "rope_factor": 32.0, "rope_original_length": 8192},
    },
    # 596,049,920 [151936]: Qwen/Qwen3-0.6B.
    "qwen3-0.6b": {
        **{"layers": 28, "hidden": 1024, "heads": 16, "kv_heads": 8, "ffn": 3072, "tied": True},
        **{"head_dim": 128, "qk_norm": "head", "rope_base": 1000000.0, "norm_eps": 1e-6},
    },
    # 1,484,916,736 [100352]: allenai/OLMo-2-0425-1B.
    "olmo2-1b": {
        **{"layers": 16, "hidden": 2048, "heads": 16, "ffn": 8192, "tied": False},
        **{"qk_norm": "whole", "norm": "post", "rope_base": 500000.0, "norm_eps": 1e-6},
    },
    # 134,515,008 [49152]: HuggingFaceTB/SmolLM2-135M.
    "smollm2-135m": {
        **{"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "tied": True, "rope_base": 100000.0},
    },
    # 494,032,768 [151936]: Qwen/Qwen2.5-0.5B.
    "qwen2.5-0.5b": {
        **{"layers": 24, "hidden": 896, "heads": 14, "kv_heads": 2, "ffn": 4864, "tied": True},
        **{"qkv_bias": True, "rope_base": 1000000.0, "norm_eps": 1e-6},
    },
    # 7,241,732,096 [32000]: mistralai/Mistral-7B-v0.1.
    "mistral-7b": {
        **{"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "tied": False},
        "sliding_window": 4096,
    },
}

VOCABULARIES = {
    **{"llama-3.2-1b": 128_256, "qwen3-0.6b": 151_936, "olmo2-1b": 100_352},
    **{"smollm2-135m": 49_152, "qwen2.5-0.5b": 151_936, "mistral-7b": 32_000},
}
"""Rows of the embedding of published models, for plans made before there is a corpus."""

# Sizes, which a preset gives where they are null; two of them only beside a size of the preset.
_SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "tied")
_BESIDE = {"kv_heads": "heads", "ffn": "hidden"}
# Options that follow another one: a preset gives them only where it gives that one too.
_FOLLOWS = {
    "sliding_from": "sliding_window",
    "rope_factor": "rope_scaling",
    "rope_original_length": "rope_scaling",
}


def preset_values(model: ModelSection) -> dict[str, Any]:
    """Return what a model section takes from its preset: sizes that are null, and options that were not given.

    Another number of heads does not keep the preset's key/value heads, nor another width its feed-forward width.

    Args:
        model: Model section as it was written.
    """
    preset = PRESETS[model.preset] if model.preset else {}
    given = model.model_fields_set
    taken: dict[str, Any] = {}
    for name, value in preset.items():
        beside = _BESIDE.get(name)
        if name in _SIZES:
            keeps = beside is None or getattr(model, beside) in (None, preset[beside])
            wanted = getattr(model, name) is None and keeps
        else:
            wanted = name not in given and _FOLLOWS.get(name) not in given
        if wanted:
            taken[name] = value
    return taken


def fill_sizes(model: ModelSection) -> ResolvedModel:
    """Fill in what was left out: from the preset, else kv_heads = heads and ffn = 8/3 hidden.

    8/3 makes a SwiGLU layer (three matrices) as large as a classic one of width 4 hidden (two matrices): Shazeer 2020.
    The width is rounded up to a multiple of 64.

    Args:
        model: Model section as it was written.

    Raises:
        ConfigError: No preset is given, and a size is missing.
    """
    values: dict[str, Any] = {**model.model_dump(), **preset_values(model)}
    if values["tied"] is None:
        values["tied"] = False
    missing = [f"model.{name}" for name in ("layers", "hidden", "heads") if values[name] is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: expected a value because model.preset is null, got none")
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["ffn"] = values["ffn"] or -(-8 * values["hidden"] // (3 * 64)) * 64
    return ResolvedModel(**values)


def layer_parameters(model: ResolvedModel) -> int:
    """Return the parameters of one transformer layer.

    Args:
        model: Resolved sizes.
    """
    return sum(tensor.numel for tensor in layer_tensors(model))


def parameters(model: ResolvedModel, vocabulary: int) -> int:
    """Return the parameters of a model.

    Args:
        model: Resolved sizes.
        vocabulary: Live rows, text tokens and pauses; padding rows do not count.
    """
    tables = 1 if model.tied else 2
    return tables * vocabulary * model.hidden + model.layers * layer_parameters(model) + model.hidden


def flops_per_token(model: ResolvedModel, vocabulary: int, sequence_length: int) -> int:
    """Return the FLOPs of forward and backward pass for one raw token: 6 N + 12 L d T (PaLM, appendix B).

    N counts the parameters that multiply: layers, norms and the output layer, not the input embedding (a look-up). Of a
    looped model, N and L count each layer as often as it runs.
    T is the window, or in a layer with a shorter sliding window that one, and d the width of all heads; the masked half
    of the attention matrix is counted too, as published figures do.

    Args:
        model: Resolved sizes.
        vocabulary: Live rows.
        sequence_length: T, tokens of a window.
    """
    return step_flops(model, vocabulary, sequence_length, tokens=1, targets=1)


def step_flops(model: ResolvedModel, vocabulary: int, sequence_length: int, *, tokens: int, targets: int) -> int:
    """Return the FLOPs of forward and backward pass of the rows that are computed; MFU is this over time and peak.

    As `flops_per_token`, but the output layer counts for rows with a target only: rows before a pause do not reach it.

    Args:
        model: Resolved sizes.
        vocabulary: Live rows.
        sequence_length: Tokens of a window.
        tokens: Raw input tokens, pauses included.
        targets: Rows that have a target.
    """
    body = model.depth * layer_parameters(model) + model.hidden
    attention = 12 * model.query_width * attended_tokens(model, sequence_length)
    return (6 * body + attention) * tokens + 6 * vocabulary * model.hidden * targets


def attended_tokens(model: ResolvedModel, sequence_length: int) -> int:
    """Return the tokens that a token attends to, summed over the layers of a forward pass, the masked half included.

    Args:
        model: Resolved sizes.
        sequence_length: Tokens of a window.
    """
    window = min(sequence_length, model.sliding_window or sequence_length)
    # Counted, not listed: a configuration may state any number of layers.
    whole = model.sliding_from + (model.loops - 1) * len(
        range(model.looped.start, min(model.sliding_from, model.looped.stop))
    )
    return whole * sequence_length + (model.depth - whole) * window


HEAD_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}


def head_chunk_rows(chunk: int | None, *, columns: int, element: int, device: str) -> int:
    """Return the rows of logits that exist at one time in the LM head.

    Args:
        chunk: `model.head_chunk`; None for a multiple of 1024 that takes at most `HEAD_BYTES`, but at least 1024.
        columns: Columns of this rank's vocabulary shard.
        element: Bytes of a logit.
        device: "cuda" or "cpu"; another one counts as a CPU.
    """
    if chunk is not None:
        return chunk
    budget = HEAD_BYTES.get(device, HEAD_BYTES["cpu"])
    return 1024 * max(1, budget // (1024 * columns * element))
