"""Arguments of a Megatron-LM run as sizes and options of the native model, and back.

A checkpoint has the run's arguments. Arguments that change what the model computes are read here, each one; those for
which the native model has no counterpart are refused unless they have the value that leaves the model as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import CheckpointError

_LLAMA3_LENGTH = 8192
"""Window before rescaling in `--use-rope-scaling`, which has no argument."""

_PLAIN: dict[str, tuple[Any, ...]] = {
    "num_experts": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "swiglu": (True,),
    "rotary_percent": (1,),
    "rotary_interleaved": (False,),
    "mrope_section": (None,),
    "rope_type": (None, "rope"),
    "no_rope_freq": (None,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (None,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "use_mup": (False,),
    "retro_add_retriever": (False,),
    "use_legacy_models": (False,),
    "spec": (None, ["local"]),
    "bert_binary_head": (None, True, False),
}
_REQUIRED = ("normalization", "position_embedding_type", "swiglu")


@dataclass(frozen=True)
class Arguments:
    """Arguments of a run in native terms.

    Attributes:
        model: Sizes and options of the model.
        rows: Rows of the embedding, padding included; None if the checkpoint does not say.
        sequence_length: Longest window.
        precision: "fp32" or "bf16".
        pause_ids: Pause ids that an export of this package noted; empty without.
    """

    model: ResolvedModel
    rows: int | None
    sequence_length: int
    precision: Literal["fp32", "bf16"]
    pause_ids: tuple[int, ...]


def read_arguments(args: Any, where: str, sequence_length: int | None = None) -> Arguments:
    """Return the native model that computes what a run's arguments describe.

    Args:
        args: `args` of the checkpoint.
        where: Names the file in messages.
        sequence_length: Longest window; None for max_position_embeddings.

    Raises:
        CheckpointError: An option that the native model lacks, or a missing or invalid value. The message has the
            argument, the expected and the actual value.
    """
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(f"{where}: expected the run's arguments under 'args', got {type(args).__name__}")
    return _Reader(vars(args), where).read(sequence_length)


class _Reader:
    """Reader of one namespace, argument by argument."""

    def __init__(self, args: dict[str, Any], where: str) -> None:
        self._args, self._where = args, where

    def read(self, sequence_length: int | None) -> Arguments:
        if self._args.get("use_rotary_position_embeddings") is True:  # the earlier name
            self._args = {**self._args, "position_embedding_type": "rope"}
        self._refuse_options()
        heads, hidden = self._size("num_attention_heads"), self._size("hidden_size")
        groups = self._size("num_query_groups") if self._flag("group_query_attention") else heads
        if heads % groups:
            raise self._wrong("num_query_groups", f"a divisor of num_attention_heads = {heads}", groups)
        channels = self._size("kv_channels", hidden // heads)
        biased = self._flag("add_bias_linear", True)
        window, first = self._window(self._size("num_layers"))
        model = ResolvedModel(
            preset=None,
            layers=self._size("num_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=groups,
            head_dim=None if channels * heads == hidden else channels,
            ffn=self._size("ffn_hidden_size"),
            tied=not self._flag("untie_embeddings_and_output_weights"),
            qkv_bias=biased or self._flag("add_qkv_bias"),
            proj_bias=biased,
            mlp_bias=biased,
            qk_norm="head" if self._flag("qk_layernorm") else None,
            sliding_window=window,
            sliding_from=first,
            rope_base=self._number("rotary_base", 10000.0),
            norm_eps=self._number("layernorm_epsilon", self._number("norm_epsilon", 1e-5)),
            init_std=self._number("init_method_std", 0.02),
            vocab_multiple=self._size("make_vocab_size_divisible_by", 128),
            **self._scaling(),
        )
        positions = self._size("max_position_embeddings", self._args.get("seq_length"))
        if sequence_length is not None and not 8 <= sequence_length <= positions:
            raise self._wrong(
                "max_position_embeddings", f"at least the {sequence_length} positions requested (8 or more)", positions
            )
        rows = None if self._args.get("padded_vocab_size") is None else self._size("padded_vocab_size")
        precision: Literal["fp32", "bf16"] = "bf16" if self._args.get("bf16") is True else "fp32"
        model = model.model_copy(update={"positions": positions})
        return Arguments(model, rows, sequence_length or positions, precision, self._pauses())

    def _refuse_options(self) -> None:
        for name, allowed in _PLAIN.items():
            if name not in self._args and name not in _REQUIRED:
                continue
            value = self._args.get(name)
            if not any(value == one and type(value) is not Ellipsis for one in allowed):
                raise self._wrong(name, " or ".join(map(repr, allowed)), value)

    def _scaling(self) -> dict[str, Any]:
        interpolation = self._args.get("rotary_seq_len_interpolation_factor")
        if self._flag("use_rope_scaling"):
            if interpolation not in (None, 1):
                raise self._wrong("rotary_seq_len_interpolation_factor", "None with use_rope_scaling", interpolation)
            factor = self._number("rope_scaling_factor", 8.0)
            return {"rope_scaling": "llama3", "rope_factor": factor, "rope_original_length": _LLAMA3_LENGTH}
        if interpolation in (None, 1):
            return {}
        return {"rope_scaling": "linear", "rope_factor": self._number("rotary_seq_len_interpolation_factor", 1.0)}

    def _window(self, layers: int) -> tuple[int | None, int]:
        """Return the sliding window in tokens, the token itself included, and the first layer that has it."""
        window = self._args.get("window_size")
        if window is None:
            return None, 0
        sizes = tuple(window) if isinstance(window, (list, tuple)) else ()
        if len(sizes) != 2 or any(type(size) is not int for size in sizes) or sizes[0] < 0 or sizes[1] not in (0, -1):
            raise self._wrong("window_size", "(tokens before, 0)", window)
        skip = self._args.get("window_attn_skip_freq")
        if skip is None:
            return sizes[0] + 1, 0
        if isinstance(skip, (list, tuple)) and len(skip) == layers:
            slides = [bool(one) for one in skip]
            first = slides.index(True) if any(slides) else layers
            if all(slides[first:]):
                return (sizes[0] + 1, first) if first < layers else (None, 0)
        raise self._wrong("window_attn_skip_freq", f"None, or a list of {layers} zeros and then ones", skip)

    def _pauses(self) -> tuple[int, ...]:
        ids = self._args.get("pause_ids")
        if ids is None:
            return ()
        if not isinstance(ids, (list, tuple)) or not ids or list(ids) != list(range(ids[0], ids[0] + len(ids))):
            raise self._wrong("pause_ids", "consecutive ids", ids)
        return tuple(ids)

    def _size(self, name: str, default: Any = None) -> int:
        value = self._args.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(name, "a whole number above 0 and below 2**31", value)
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._args.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._wrong(name, "a number above 0", value)
        return float(value)

    def _flag(self, name: str, default: bool = False) -> bool:
        value = self._args.get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, "True or False", value)
        return value

    def _wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self._where}: args.{name}: expected {expected}, got {str(value)[:200]!r}")


def write_arguments(
    config: ResolvedConfig, *, live_rows: int, padded_rows: int, tensor_parallel: int, iteration: int
) -> argparse.Namespace:
    """Return the arguments with which Megatron-LM builds the model of a checkpoint.

    Args:
        config: Configuration of the checkpoint.
        live_rows: Vocabulary rows that are text or pauses.
        padded_rows: Vocabulary rows, padding included.
        tensor_parallel: Tensor-parallel size.
        iteration: Step of the checkpoint.

    Raises:
        CheckpointError: An option that Megatron-LM has no argument for.
    """
    model, length = config.model, config.data.sequence_length
    _check_counterpart(model)
    names: dict[str, Any] = {
        "num_layers": model.depth,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": model.kv_heads != model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.channels,
        "seq_length": length,
        "max_position_embeddings": config.positions,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "layernorm_epsilon": model.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm is not None,
        "untie_embeddings_and_output_weights": not model.tied,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": False,
        "add_position_embedding": True,
        "rotary_base": int(model.rope_base) if model.rope_base.is_integer() else model.rope_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": model.rope_scaling == "llama3",
        "rope_scaling_factor": model.rope_factor if model.rope_scaling == "llama3" else 8.0,
        "rotary_seq_len_interpolation_factor": int(model.rope_factor) if model.rope_scaling == "linear" else None,
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
        "window_attn_skip_freq": _skips(model),
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
        "num_experts": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "make_vocab_size_divisible_by": model.vocab_multiple,
        "vocab_size": live_rows,
        "padded_vocab_size": padded_rows,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "bf16": config.engine.precision == "bf16",
        "fp16": False,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "ckpt_format": "torch_dist",
        "use_dist_ckpt": True,
        "no_save_rng": True,
        "data_parallel_random_init": False,
    }
    return argparse.Namespace(**names)


def _skips(model: ResolvedModel) -> list[int] | None:
    if model.sliding_window is None or model.sliding_from == 0:
        return None
    return [int(model.window_of(layer) is not None) for layer in model.order]


def _check_counterpart(model: ResolvedModel) -> None:
    biases = (model.proj_bias, model.mlp_bias)
    wrong = {
        "norm": (model.norm != "pre", "pre"),
        "qk_norm": (model.qk_norm == "whole", "head or null"),
        "proj_bias": (biases not in ((False, False), (True, True)), "the value of model.mlp_bias"),
        "rope_scaling": (model.rope_scaling == "yarn", "linear, llama3 or null"),
        "rope_factor": (
            model.rope_scaling == "linear" and not model.rope_factor.is_integer(),
            "a whole number with rope_scaling=linear",
        ),
        "rope_original_length": (
            model.rope_scaling == "llama3" and model.rope_original_length != _LLAMA3_LENGTH,
            f"{_LLAMA3_LENGTH}",
        ),
        "rope_low_freq": (model.rope_scaling == "llama3" and model.rope_low_freq != 1, "1"),
        "rope_high_freq": (model.rope_scaling == "llama3" and model.rope_high_freq != 4, "4"),
    }
    for key, (is_wrong, expected) in wrong.items():
        if is_wrong:
            raise CheckpointError(
                f"config.yaml: model.{key}: expected {expected}, for which Megatron-LM has arguments, got "
                f"{getattr(model, key)!r}"
            )
