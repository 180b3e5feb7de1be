"""LoRA adapters on megatron-core's linear layers: W x + scale B A x, right under tensor and sequence parallelism.

`config.lora` has names, shapes and how they are split. The product is added where the layer multiplies by its weight,
before a row-parallel layer sums over ranks and before any norm of its output. What ranks exchange for it:

    column-parallel   A is whole, B split. Activations of width `rank` are gathered (sequence parallelism) or their
                      gradients summed, so the hidden states are not exchanged again.
    row-parallel      A is split, B whole. The product is a partial sum, which the layer's own reduction sums. The
                      gradient of B is summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from pause_megatron.config.lora import LORA_A, LORA_B, TARGETS, adapted_layers, scale
from pause_megatron.config.model_schema import LoraSection
from pause_megatron.errors import ConfigError
from pause_megatron.model.gpt import PauseGPTModel
from pause_megatron.model.init import normal

_MARK = "is_adapter"


def is_adapter(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is of an adapter."""
    return getattr(parameter, _MARK, False)


def add_adapters(model: PauseGPTModel, lora: LoraSection, *, seed: int) -> None:
    """Add adapters to a fresh model, which computes the same as before: A is random, B is 0.

    A is normal with the variance of peft's default, 1 / (3 inputs). It depends on the seed and the parameter's name,
    not on ranks. Call it before the hooks of sequence parallelism are registered.

    Args:
        model: This rank's shard.
        lora: Rank, scale, matrices and layers.
        seed: Seed of the run.

    Raises:
        ConfigError: A linear layer is not megatron-core's own, or `lora.layers` is no range of layers.
    """
    layers = dict(enumerate(model.decoder.layers.children()))
    for number in adapted_layers(lora, len(layers)):
        for target in lora.targets:
            module, name = layers[number].get_submodule(TARGETS[target]), f"decoder.layers.{number}.{TARGETS[target]}"
            if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                raise ConfigError(
                    f"lora.targets: {name}: expected megatron-core's linear layer, got {type(module).__name__}; use "
                    "model.attention=sdpa"
                )
            _adapt(module, name, lora, seed)


def _adapt(module: ColumnParallelLinear | RowParallelLinear, name: str, lora: LoraSection, seed: int) -> None:
    group, weight, by_rows = module.tp_group, module.weight, isinstance(module, RowParallelLinear)
    inputs = module.input_size
    drawn = normal(seed, f"{name}.{LORA_A}", (lora.rank, inputs), 1 / math.sqrt(3 * inputs), weight.device)
    if by_rows:
        drawn = drawn.chunk(group.size(), dim=1)[group.rank()]
    low = nn.Parameter(drawn.to(weight.dtype).contiguous())
    high = nn.Parameter(torch.zeros(weight.shape[0], lora.rank, dtype=weight.dtype, device=weight.device))
    split, whole = (low, high) if by_rows else (high, low)
    set_tensor_model_parallel_attributes(split, True, 1 if by_rows else 0, 1)
    setattr(whole, "sequence_parallel", module.sequence_parallel)  # noqa: B010
    for parameter in (low, high):
        setattr(parameter, _MARK, True)
    module.register_parameter(LORA_A, low)
    module.register_parameter(LORA_B, high)
    wrap = _row_parallel if by_rows else _column_parallel
    module._forward_impl = wrap(module, module._forward_impl, scale(lora))


def _column_parallel(module: Any, product: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    group = module.tp_group

    def adapted(**arguments: Any) -> Tensor:
        low = F.linear(arguments["input"], module.lora_a)
        if module.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=group)
        return torch.add(product(**arguments), F.linear(low, module.lora_b), alpha=factor)

    return adapted


def _row_parallel(module: Any, product: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    group = module.tp_group

    def adapted(**arguments: Any) -> Tensor:
        high = module.lora_b
        if not module.sequence_parallel:  # under it, a hook on the parameter sums (model.sequence_parallel)
            high = copy_to_tensor_model_parallel_region(high, group=group)
        low = F.linear(arguments["input"], module.lora_a)
        return torch.add(product(**arguments), F.linear(low, high), alpha=factor)

    return adapted
