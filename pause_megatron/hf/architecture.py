"""Model configurations: a native model to a Hugging Face `config.json`, and back with a check of every option."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pause_megatron.config.families import FAMILIES, Family
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.config_keys import ConfigKeys
from pause_megatron.hf.positions import read_rope, read_window, rope_json, window_json

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_GIVEN = ("dtype", "torch_dtype", "architectures", "rope_parameters", "transformers_version")
"""Keys whose defaults are not values of a model."""


@dataclass(frozen=True)
class Architecture:
    """Content of a `config.json` in native terms.

    Attributes:
        family: Model type, a key of `FAMILIES`.
        model: Sizes and options of the model.
        rows: Rows of the embedding.
        sequence_length: Longest window for which the native model computes the same.
        pause: The folder's "pause" entry, which exports of this package have; None without one.
        dtype: Type of the weights, "fp32", "bf16" or "fp16"; None without the key.
    """

    family: str
    model: ResolvedModel
    rows: int
    sequence_length: int
    pause: Mapping[str, Any] | None
    dtype: str | None


def config_json(
    model: ResolvedModel,
    *,
    family: Family,
    live_rows: int,
    sequence_length: int,
    dtype: str,
    special_ids: Mapping[str, int | list[int] | None],
    pause: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the `config.json` of a plain model of one of the families.

    A looped model is a plain model of as many layers as its forward pass has. "loops" notes how often weights repeat,
    and "loop_layers" the first and the last of its own layers that do, where not all do.

    Args:
        model: Sizes of the model.
        family: Family of the export, which has the options of the model.
        live_rows: Rows of the embedding: text and pauses, no padding.
        sequence_length: Becomes max_position_embeddings.
        dtype: "fp32", "bf16" or "fp16".
        special_ids: Ids by role: "eos" (one or several), and "bos" and "pad" where they exist.
        pause: The "pause" entry; transformers keeps keys that it does not know.
    """
    plain = model.unrolled()
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": live_rows,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": plain.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        **rope_json(model),
        **window_json(plain, family),
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
        **{f"{role}_token_id": special_ids.get(role) for role in ("bos", "eos", "pad")},
        "pause": dict(pause),
    }
    if "head_dim" in class_keys(family) or model.channels * model.heads != model.hidden:
        config["head_dim"] = model.channels
    if family.attention_bias == "flag":
        config["attention_bias"] = model.qkv_bias
    if family.mlp_bias:
        config["mlp_bias"] = model.mlp_bias
    if model.loops > 1:
        config["loops"] = model.loops
    if model.loop_layers is not None:
        config["loop_layers"] = [model.looped.start, model.looped.stop - 1]
    return config


def read_architecture(config: Mapping[str, Any], where: str, sequence_length: int | None = None) -> Architecture:
    """Return the native model that computes what a `config.json` describes.

    Args:
        config: Content of the file.
        where: Names the file in messages.
        sequence_length: Longest window; None for max_position_embeddings.

    Raises:
        CheckpointError: Custom code, another architecture, or an option that the native model lacks. The message has
            the key, the expected and the actual value.
    """
    family = _family(ConfigKeys(config, {}, where), where)
    keys = ConfigKeys(config, class_keys(family), where)
    keys.refuse_unknown(_every_class_key(), family.architecture)
    keys.expect("hidden_act", ("silu", "swish"))
    keys.expect("quantization_config", (None,))
    keys.expect("attention_dropout", (0,), 0)
    keys.expect("residual_dropout", (0, None))
    length = keys.size("max_position_embeddings")
    if sequence_length is not None and length < sequence_length:
        raise keys.wrong("max_position_embeddings", f"at least the {sequence_length} positions requested", length)
    length = length if sequence_length is None else sequence_length
    if length < 8:
        raise keys.wrong("max_position_embeddings", "8 or more positions", length)
    native_dtypes = {name: key for key, name in DTYPES.items()}
    dtype = native_dtypes.get(str(keys.get("dtype") or keys.get("torch_dtype")))
    pause = keys.get("pause")
    return Architecture(
        family.model_type,
        _model(keys, family),
        keys.size("vocab_size"),
        length,
        pause if isinstance(pause, Mapping) else None,
        dtype,
    )


def _family(keys: ConfigKeys, where: str) -> Family:
    for key in ("auto_map", "custom_generate", "trust_remote_code"):
        if keys.get(key):
            raise CheckpointError(
                f"{where}: {key} requires code from the folder, which is never executed. "
                f"If the model is a plain one of {', '.join(FAMILIES)}, remove the key"
            )
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise keys.wrong("model_type", f"one of {', '.join(FAMILIES)}", model_type)
    family = FAMILIES[model_type]
    keys.expect("architectures", (None, [family.architecture]))
    return family


def _model(keys: ConfigKeys, family: Family) -> ResolvedModel:
    heads, hidden, layers = (keys.size(f"{n}") for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    kv_heads = keys.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    flagged = family.attention_bias == "flag" and keys.flag("attention_bias")
    return ResolvedModel(
        preset=None,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(keys, family, hidden, heads),
        ffn=keys.size("intermediate_size"),
        tied=keys.flag("tie_word_embeddings"),
        qkv_bias=flagged or family.attention_bias == "qkv",
        proj_bias=flagged,
        mlp_bias=family.mlp_bias and keys.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        norm=family.norm,
        norm_eps=keys.number("rms_norm_eps"),
        init_std=keys.number("initializer_range"),
        positions=keys.size("max_position_embeddings"),
        **{"family": family.model_type, **read_rope(keys), **read_window(keys, family, layers)},
    )


def _head_dim(keys: ConfigKeys, family: Family, hidden: int, heads: int) -> int | None:
    """Return the channels of a head; None where they are hidden / heads."""
    if family.divided and hidden % heads:
        raise keys.wrong("hidden_size", f"a multiple of num_attention_heads = {heads}", hidden)
    given = keys.get("head_dim")
    if given is None and not family.divided and family.model_type != "mistral" and "head_dim" in keys:
        raise keys.wrong("head_dim", "a whole number, or no such key: transformers does not read null here", None)
    channels = hidden // heads if given is None else keys.size("head_dim")
    if channels % 2 or not channels:
        raise keys.wrong("head_dim", "an even number of channels (hidden_size / num_attention_heads)", channels)
    return None if channels * heads == hidden else channels


def check_readable(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Check that transformers reads a `config.json`: it refuses further values, of keys that the native model ignores.

    Args:
        config: Content of the file, which `read_architecture` accepts.
        family: Family of the model.
        where: Names the file in messages.

    Raises:
        CheckpointError: transformers raises an error, whose last line the message has.
    """
    try:
        _config_class(family)(**copy.deepcopy(dict(config)))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{where}: expected what transformers reads, got its error: {reason[-1].strip()}"
        ) from None


def _config_class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))


@cache
def _every_class_key() -> frozenset[str]:
    """Return the keys of all families' classes: a key of another family is in a file by habit, and has no effect."""
    own = {"pause", "loops", "loop_layers", "dtype", "quantization_config", "original_max_position_embeddings", *_GIVEN}
    own |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    return frozenset(own.union(*map(class_keys, FAMILIES.values())))


@cache
def class_keys(family: Family) -> Mapping[str, Any]:
    """Return the keys of transformers' configuration class, with the values of those that a config.json leaves out.

    A default of None follows from other keys (num_key_value_heads, head_dim).

    Args:
        family: The family.
    """
    parameters = inspect.signature(_config_class(family).__init__).parameters.items()
    return {
        name: parameter.default
        for name, parameter in parameters
        if parameter.default is not inspect.Parameter.empty and name not in _GIVEN
    }
