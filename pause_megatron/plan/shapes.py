"""Every parameter of one tensor-parallel rank: name, shape, group. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pause_megatron.config.schema import ResolvedModel


@dataclass(frozen=True)
class Parameter:
    """A parameter as one rank holds it.

    Attributes:
        name: as `PauseGPTModel.named_parameters()` says it
        shape: of this rank's shard
        decays: whether it is in the optimizer's group with weight decay (`pause_megatron.model.decay`)
        replicated: whether every tensor-parallel rank holds all of it
    """

    name: str
    shape: tuple[int, ...]
    decays: bool
    replicated: bool = False

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return math.prod(self.shape)


def padded_vocabulary(model: ResolvedModel, vocabulary: int, tensor: int) -> int:
    """Rows of the vocabulary matrices over all ranks: upwards to a multiple of model.vocab_multiple x tensor."""
    step = model.vocab_multiple * tensor
    return -(-vocabulary // step) * step


def rank_parameters(model: ResolvedModel, vocabulary: int, tensor: int) -> tuple[Parameter, ...]:
    """This rank's parameters in the order of `PauseGPTModel.named_parameters()`; the same on every rank.

    Args:
        model: with all sizes filled in
        vocabulary: live rows, text and pauses
        tensor: tensor-parallel ranks
    """
    hidden = model.hidden
    rows = padded_vocabulary(model, vocabulary, tensor) // tensor
    found = [Parameter("embedding.word_embeddings.weight", (rows, hidden), decays=False)]
    for layer in range(model.layers):
        found += _layer(model, tensor, f"decoder.layers.{layer}.")
    found.append(Parameter("decoder.final_layernorm.weight", (hidden,), decays=False, replicated=True))
    if not model.tied:
        found.append(Parameter("output_layer.weight", (rows, hidden), decays=False))
    return tuple(found)


def _layer(model: ResolvedModel, tensor: int, prefix: str) -> list[Parameter]:
    hidden, width = model.hidden, qkv_width(model, tensor)
    names = [
        Parameter("input_layernorm.weight", (hidden,), decays=False, replicated=True),
        Parameter("self_attention.linear_proj.weight", (hidden, hidden // tensor), decays=True),
        Parameter("self_attention.linear_qkv.weight", (width, hidden), decays=True),
    ]
    if model.qkv_bias:
        names.append(Parameter("self_attention.linear_qkv.bias", (width,), decays=False))
    names += [
        Parameter("pre_mlp_layernorm.weight", (hidden,), decays=False, replicated=True),
        Parameter("mlp.linear_fc1.weight", (2 * model.ffn // tensor, hidden), decays=True),
        Parameter("mlp.linear_fc2.weight", (hidden, model.ffn // tensor), decays=True),
    ]
    return [Parameter(prefix + p.name, p.shape, p.decays, p.replicated) for p in names]


def qkv_width(model: ResolvedModel, tensor: int) -> int:
    """Channels of queries, keys and values on one rank."""
    return (model.hidden + 2 * model.kv_heads * (model.hidden // model.heads)) // tensor
