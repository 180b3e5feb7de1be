"""Which parameters ZeRO stage 3 gathers how often, and how many exist at one time. No torch.

DeepSpeed frees a gathered parameter after the module that used it, unless a module within
`stage3_max_reuse_distance` elements of parameters uses it again (partitioned_param_coordinator.py). Parameters up to
`stage3_param_persistence_threshold` elements are never split. Everything else is freed at the end of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pause_megatron.plan.layout import Layout, padded
from pause_megatron.plan.shapes import Parameter

_CALL_ORDER = ("input_layernorm", "linear_qkv", "linear_proj", "pre_mlp_layernorm", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Live:
    """What a micro-batch gathers.

    Attributes:
        gathered_numel: elements that a micro-batch gathers, padding included
        persistent_numel: elements that are whole on every rank at all times, gathered once a step
        peak_numel: largest number of split elements that exist whole at one time
    """

    gathered_numel: int
    persistent_numel: int
    peak_numel: int


def live_parameters(layout: Layout) -> Live:
    """Follows a micro-batch through its modules."""
    threshold = layout.zero.get("stage3_param_persistence_threshold", 100_000)
    reuse = layout.zero.get("stage3_max_reuse_distance", 1_000_000_000)
    persistent = sum(padded(p.numel, layout.data_parallel) for p in layout.parameters if p.numel <= threshold)
    gathered = held = peak = 0
    available: set[str] = set()
    visits = _visits(layout)
    for index, module in enumerate(visits):
        for parameter in module:
            if parameter.numel > threshold and parameter.name not in available:
                available.add(parameter.name)
                held += parameter.numel
                gathered += padded(parameter.numel, layout.data_parallel)
        peak = max(peak, held)
        soon = _used_within(visits, index + 1, reuse)
        for parameter in module:
            if parameter.name in available and parameter.name not in soon:
                available.remove(parameter.name)
                held -= parameter.numel
    return Live(gathered, persistent, peak)


def _used_within(visits: Sequence[tuple[Parameter, ...]], start: int, distance: int) -> set[str]:
    names: set[str] = set()
    passed = 0
    for module in visits[start:]:
        if passed >= distance:
            break
        names.update(parameter.name for parameter in module)
        passed += sum(parameter.numel for parameter in module)
    return names


def _visits(layout: Layout) -> list[tuple[Parameter, ...]]:
    """The parameters of each module, in the order in which a forward and a backward pass use them."""
    by_name = {p.name: p for p in layout.parameters}
    embedding = (by_name["embedding.word_embeddings.weight"],)
    norm = (by_name["decoder.final_layernorm.weight"],)
    output = (by_name["output_layer.weight"],) if "output_layer.weight" in by_name else embedding
    layers = [_layer(layout.parameters, index) for index in range(layout.model.layers)]
    forward = [embedding, *(module for layer in layers for module in layer), norm, output]
    backward = [output, norm]
    for layer in reversed(layers):
        backward += [*(layer if layout.recompute else ()), *reversed(layer)]
    return [*forward, *backward, embedding]


def _layer(parameters: Sequence[Parameter], index: int) -> list[tuple[Parameter, ...]]:
    mine = [p for p in parameters if p.name.startswith(f"decoder.layers.{index}.")]
    return [tuple(p for p in mine if f".{module}." in p.name) for module in _CALL_ORDER]
