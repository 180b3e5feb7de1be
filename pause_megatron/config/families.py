"""Families of decoders: the options of each, and every tensor of a layer with its native and its Hugging Face names.

Import, export, `plan`, FLOPs and the model card read these two tables. Differences between the two formats:

- megatron-core keeps queries, keys and values in one matrix, grouped by query group: the queries of group 0, its key,
  its value, the queries of group 1, ... Hugging Face keeps three matrices, each by head.
- megatron-core keeps SwiGLU's gate and up projection in one matrix, the gate first.
- Rotary channels are halves of a head in both (not interleaved pairs), so rows within a head stay in their order.
- A family with one flag for all attention biases has one on the attention's output; where the native model has none, it
  is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pause_megatron.config.model_schema import ResolvedModel


@dataclass(frozen=True)
class Family:
    """A model type of transformers, and which options of `model:` it has.

    Attributes:
        model_type: `model_type` of config.json, and the value of `model.family`.
        architecture: Class of the model.
        title: Name in texts.
        qk_norm: Required `model.qk_norm`.
        norm: Required `model.norm`.
        attention_bias: "never"; "qkv": always on queries, keys and values, never on the output; "flag": config.json's
            attention_bias, on all four.
        mlp_bias: Whether config.json has a flag mlp_bias.
        sliding: Layers that can have a sliding window: "never", "all", or "from" one layer on.
        divided: Whether transformers requires a hidden size that is a multiple of the number of heads.
    """

    model_type: str
    architecture: str
    title: str
    qk_norm: Literal["head", "whole"] | None = None
    norm: Literal["pre", "post"] = "pre"
    attention_bias: Literal["never", "qkv", "flag"] = "flag"
    mlp_bias: bool = False
    sliding: Literal["never", "all", "from"] = "never"
    divided: bool = False

    def lacks(self, model: ResolvedModel) -> tuple[str, ...]:
        """Return the keys of `model:` whose values this family does not have.

        Args:
            model: Resolved sizes and options.
        """
        wrong = {
            "head_dim": self.divided and model.hidden % model.heads != 0,
            "qk_norm": model.qk_norm != self.qk_norm,
            "norm": model.norm != self.norm,
            "qkv_bias": {"never": model.qkv_bias, "qkv": not model.qkv_bias, "flag": False}[self.attention_bias],
            "proj_bias": model.proj_bias and self.attention_bias != "flag",
            "mlp_bias": model.mlp_bias and not self.mlp_bias,
            "sliding_window": model.sliding_window is not None and self.sliding == "never",
            "sliding_from": model.sliding_window is not None and model.sliding_from > 0 and self.sliding != "from",
        }
        return tuple(key for key, is_wrong in wrong.items() if is_wrong)

    def zero_biases(self, model: ResolvedModel) -> tuple[str, ...]:
        """Return the biases of a layer that the family has and the native model lacks, which are zero.

        Args:
            model: Resolved sizes and options.
        """
        return ("self_attn.o_proj.bias",) if self._biased(model) and not model.proj_bias else ()

    def _biased(self, model: ResolvedModel) -> bool:
        return self.attention_bias == "flag" and model.qkv_bias


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "Llama", mlp_bias=True, divided=True),
        Family("qwen2", "Qwen2ForCausalLM", "Qwen2", attention_bias="qkv", sliding="from"),
        Family("mistral", "MistralForCausalLM", "Mistral", attention_bias="never", sliding="all"),
        Family("qwen3", "Qwen3ForCausalLM", "Qwen3", qk_norm="head", sliding="from"),
        Family("olmo2", "Olmo2ForCausalLM", "OLMo 2", qk_norm="whole", norm="post"),
    )
}
"""Families by model type. TinyLlama, SmolLM2 and Llama 1 to 3.3 are of type llama, Qwen2.5 of type qwen2."""


def families_of(model: ResolvedModel) -> tuple[Family, ...]:
    """Return the families that compute what a model computes, the preferred one first.

    `model.family` comes first. Without it, a model with biases on queries, keys and values is preferably a Qwen2.

    Args:
        model: Resolved sizes and options.
    """
    found = [family for family in FAMILIES.values() if not family.lacks(model)]
    found.sort(key=lambda family: (family.model_type != model.family, family.attention_bias != "qkv"))
    return tuple(found)


@dataclass(frozen=True)
class Piece:
    """Rows `[start, start + count)` of a native tensor: the next `count` rows of a Hugging Face tensor."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class LayerTensor:
    """A parameter of a layer.

    Attributes:
        name: Native name, below `decoder.layers.N.`.
        shape: Shape at tensor-parallel size 1.
        split: Dimension along which tensor parallelism shards it; None: every rank has the whole.
        decays: Whether it has weight decay.
        pieces: The Hugging Face tensors that it holds, below `model.layers.N.`.
    """

    name: str
    shape: tuple[int, ...]
    split: Literal[0, 1] | None
    decays: bool
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements at tensor-parallel size 1."""
        return math.prod(self.shape)


def layer_tensors(model: ResolvedModel) -> tuple[LayerTensor, ...]:
    """Return the parameters of one layer, in the order of `PauseGPTModel.named_parameters()`.

    Args:
        model: Resolved sizes and options.
    """
    return (*_attention(model), *_feed_forward(model))


def _attention(model: ResolvedModel) -> Iterator[LayerTensor]:
    pre, hidden, attention = model.norm == "pre", model.hidden, "self_attention."
    if pre:
        yield _whole("input_layernorm.weight", "input_layernorm.weight", hidden)
    proj = f"{attention}linear_proj."
    yield _matrix(f"{proj}weight", (hidden, model.query_width), 1, (Piece("self_attn.o_proj.weight", 0, hidden),))
    if model.proj_bias:
        yield _whole(f"{proj}bias", "self_attn.o_proj.bias", hidden)
    if not pre:
        yield _whole(f"{proj}post_layernorm.weight", "post_attention_layernorm.weight", hidden)
    rows = model.query_width + 2 * model.kv_width
    yield _matrix(f"{attention}linear_qkv.weight", (rows, hidden), 0, _qkv_pieces(model, "weight"))
    if model.qkv_bias:
        yield LayerTensor(f"{attention}linear_qkv.bias", (rows,), 0, False, _qkv_pieces(model, "bias"))
    if model.qk_norm is not None:
        whole = model.qk_norm == "whole"
        for part, width in (("q", model.query_width), ("k", model.kv_width)):
            width = width if whole else model.channels
            yield _whole(f"{attention}{part}_layernorm.weight", f"self_attn.{part}_norm.weight", width)


def _feed_forward(model: ResolvedModel) -> Iterator[LayerTensor]:
    hidden, ffn = model.hidden, model.ffn
    if model.norm == "pre":
        yield _whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden)

    def gated(kind: str) -> tuple[Piece, ...]:
        return (Piece(f"mlp.gate_proj.{kind}", 0, ffn), Piece(f"mlp.up_proj.{kind}", ffn, ffn))

    yield _matrix("mlp.linear_fc1.weight", (2 * ffn, hidden), 0, gated("weight"))
    if model.mlp_bias:
        yield LayerTensor("mlp.linear_fc1.bias", (2 * ffn,), 0, False, gated("bias"))
    yield _matrix("mlp.linear_fc2.weight", (hidden, ffn), 1, (Piece("mlp.down_proj.weight", 0, hidden),))
    if model.mlp_bias:
        yield _whole("mlp.linear_fc2.bias", "mlp.down_proj.bias", hidden)
    if model.norm == "post":
        yield _whole("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", hidden)


def _whole(name: str, hf: str, size: int) -> LayerTensor:
    return LayerTensor(name, (size,), None, False, (Piece(hf, 0, size),))


def _matrix(name: str, shape: tuple[int, int], split: Literal[0, 1], pieces: tuple[Piece, ...]) -> LayerTensor:
    return LayerTensor(name, shape, split, True, pieces)


def _qkv_pieces(model: ResolvedModel, kind: str) -> tuple[Piece, ...]:
    """Return queries, key and value of each query group, in their order in linear_qkv."""
    queries, channels = model.query_width // model.kv_heads, model.channels
    pieces = []
    for group in range(model.kv_heads):
        start = group * (queries + 2 * channels)
        pieces += [
            Piece(f"self_attn.q_proj.{kind}", start, queries),
            Piece(f"self_attn.k_proj.{kind}", start + queries, channels),
            Piece(f"self_attn.v_proj.{kind}", start + queries + channels, channels),
        ]
    return tuple(pieces)
