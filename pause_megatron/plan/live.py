"""Parameters that ZeRO stage 3 gathers: how many per micro-batch, and how many are live at one time.

DeepSpeed frees a gathered parameter after the module that used it, unless a module within `stage3_max_reuse_distance`
elements uses it again (partitioned_param_coordinator.py). Parameters of at most `stage3_param_persistence_threshold`
elements are never partitioned. All others are freed at the end of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pause_megatron.config.lora import LORA_A, LORA_B
from pause_megatron.plan.layout import Layout, padded
from pause_megatron.plan.shapes import Parameter

# Parameters of the modules of a layer, in the order of the forward pass.
_CALL_ORDER = (
    ("input_layernorm.weight",),
    ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"),
    ("self_attention.q_layernorm.weight",),
    ("self_attention.k_layernorm.weight",),
    ("self_attention.linear_proj.weight", "self_attention.linear_proj.bias"),
    ("self_attention.linear_proj.post_layernorm.weight",),
    ("pre_mlp_layernorm.weight",),
    ("mlp.linear_fc1.weight", "mlp.linear_fc1.bias"),
    ("mlp.linear_fc2.weight", "mlp.linear_fc2.bias"),
    ("mlp.linear_fc2.post_layernorm.weight",),
)


@dataclass(frozen=True)
class Live:
    """Elements that a micro-batch gathers.

    Attributes:
        gathered_numel: Elements gathered in a micro-batch, padding included.
        persistent_numel: Elements that are never partitioned, gathered once a step.
        peak_numel: Maximum of partitioned elements that are live at one time.
    """

    gathered_numel: int
    persistent_numel: int
    peak_numel: int


def live_parameters(layout: Layout) -> Live:
    """Return the gathered elements, following a micro-batch through its modules.

    Args:
        layout: A run on its ranks.
    """
    threshold = layout.zero.get("stage3_param_persistence_threshold", 100_000)
    reuse = layout.zero.get("stage3_max_reuse_distance", 1_000_000_000)
    persistent = sum(padded(p.numel, layout.data_parallel) for p in layout.parameters if p.numel <= threshold)
    gathered = held = peak = 0
    whole: set[str] = set()
    visits = _visits(layout)
    kept = _kept(visits, reuse)
    for index, module in enumerate(visits):
        for parameter in module:
            if parameter.numel > threshold and parameter.name not in whole:
                whole.add(parameter.name)
                held += parameter.numel
                gathered += padded(parameter.numel, layout.data_parallel)
        peak = max(peak, held)
        for parameter in module:
            if parameter.name in whole and (index, parameter.name) not in kept:
                whole.remove(parameter.name)
                held -= parameter.numel
    return Live(gathered, persistent, peak)


def _kept(visits: Sequence[tuple[Parameter, ...]], distance: int) -> set[tuple[int, str]]:
    """Return (module, parameter) after which the parameter stays live: its next use is within `distance` elements."""
    passed = [0, *accumulate(sum(parameter.numel for parameter in module) for module in visits)]
    next_use: dict[str, int] = {}
    kept = set()
    for index in reversed(range(len(visits))):
        for parameter in visits[index]:
            again = next_use.get(parameter.name)
            if again is not None and passed[again] - passed[index + 1] < distance:
                kept.add((index, parameter.name))
            next_use[parameter.name] = index
    return kept


def _visits(layout: Layout) -> list[tuple[Parameter, ...]]:
    """Return the parameters of each module, in the order of a forward and a backward pass."""
    by_name = {p.name: p for p in layout.parameters}
    embedding = (by_name["embedding.word_embeddings.weight"],)
    norm = (by_name["decoder.final_layernorm.weight"],)
    output = (by_name["output_layer.weight"],) if "output_layer.weight" in by_name else embedding
    layers = [_layer(by_name, index) for index in layout.model.order]
    forward: list[tuple[Parameter, ...]] = [embedding, *(module for layer in layers for module in layer), norm, output]
    backward: list[tuple[Parameter, ...]] = [output, norm]
    for layer in reversed(layers):
        backward += [*(layer if layout.recompute else ()), *reversed(layer)]
    return [*forward, *backward, embedding]


def _layer(by_name: Mapping[str, Parameter], index: int) -> list[tuple[Parameter, ...]]:
    prefix = f"decoder.layers.{index}."
    modules = ((*module, *_adapters(module)) for module in _CALL_ORDER)
    return [tuple(by_name[prefix + name] for name in module if prefix + name in by_name) for module in modules]


def _adapters(module: Iterable[str]) -> list[str]:
    linear = [name.removesuffix("weight") for name in module if ".linear_" in name and name.endswith(".weight")]
    return [f"{name}{kind}" for name in linear for kind in (LORA_A, LORA_B)]
