"""Name, shape and optimizer group of each parameter of a tensor-parallel rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pause_megatron.config.families import LayerTensor
from pause_megatron.config.lora import adapted_tensors
from pause_megatron.config.model_schema import LoraSection, ResolvedModel


@dataclass(frozen=True)
class Parameter:
    """A parameter on one rank.

    Attributes:
        name: Name in `PauseGPTModel.named_parameters()`.
        shape: Shape of this rank's shard.
        decays: Whether it is in the optimizer's group with weight decay (`pause_megatron.model.decay`).
        replicated: Whether each tensor-parallel rank holds all of it.
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
    """Return the rows of the vocabulary matrices over all ranks, padding included.

    Args:
        model: Resolved sizes.
        vocabulary: Live rows, text and pauses.
        tensor: Tensor-parallel size; rows are padded to a multiple of it times `model.vocab_multiple`.
    """
    step = model.vocab_multiple * tensor
    return -(-vocabulary // step) * step


def rank_parameters(
    model: ResolvedModel, vocabulary: int, tensor: int, lora: LoraSection | None = None
) -> tuple[Parameter, ...]:
    """Return a rank's parameters in the order of `PauseGPTModel.named_parameters()`; every rank has the same.

    Args:
        model: Resolved sizes.
        vocabulary: Live rows, text and pauses.
        tensor: Tensor-parallel size.
        lora: Adapters that the run trains; None: none.
    """
    hidden = model.hidden
    rows = padded_vocabulary(model, vocabulary, tensor) // tensor
    parameters = [Parameter("embedding.word_embeddings.weight", (rows, hidden), decays=False)]
    for layer in range(model.layers):
        table = adapted_tensors(model, lora, layer)
        parameters += [_on_rank(one, tensor, f"decoder.layers.{layer}.") for one in table]
    parameters.append(Parameter("decoder.final_layernorm.weight", (hidden,), decays=False, replicated=True))
    if not model.tied:
        parameters.append(Parameter("output_layer.weight", (rows, hidden), decays=False))
    return tuple(parameters)


def _on_rank(one: LayerTensor, tensor: int, prefix: str) -> Parameter:
    shape = tuple(size // tensor if dimension == one.split else size for dimension, size in enumerate(one.shape))
    return Parameter(f"{prefix}{one.name}", shape, one.decays, one.split is None)


def key_groups(model: ResolvedModel, tensor: int) -> int:
    """Return the key/value heads that a rank computes with; ranks share one where there are fewer heads than ranks.

    Args:
        model: Resolved sizes.
        tensor: Tensor-parallel size.
    """
    return max(1, model.kv_heads // tensor)


def copies_queries(model: ResolvedModel, tensor: int) -> bool:
    """Return whether a rank's queries are copied out of linear_qkv's output: those of a group lie beside its keys.

    Args:
        model: Resolved sizes.
        tensor: Tensor-parallel size.
    """
    return key_groups(model, tensor) > 1 and model.kv_heads < model.heads


def gathers_qkv(model: ResolvedModel, tensor: int) -> bool:
    """Return whether the ranks gather the output of linear_qkv, as megatron-core does where they share key/value heads.

    Args:
        model: Resolved sizes.
        tensor: Tensor-parallel size.
    """
    return model.kv_heads < tensor


def qkv_width(model: ResolvedModel, tensor: int) -> int:
    """Return the columns of linear_qkv on one rank.

    Args:
        model: Resolved sizes.
        tensor: Tensor-parallel size.
    """
    return (model.query_width + 2 * model.kv_width) // tensor
