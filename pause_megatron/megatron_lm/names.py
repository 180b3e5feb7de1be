"""Names of parameters in Megatron-LM's checkpoints, for the parameters of the native model.

megatron-core calls them almost as here, with two differences. A norm before a linear layer has the name that
Transformer Engine's fused layer gives it; in torch_dist megatron-core's local layers use that name too. And torch_dist
stacks all layers: `decoder.layers.mlp.linear_fc2.weight` has one more dimension, the layer, in front. Rows are ordered
as in `checkpoint.layout`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pause_megatron.config.model_schema import ResolvedModel

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
GATED = ("mlp.linear_fc1.weight", "mlp.linear_fc1.bias")
_STATEFUL = (
    *("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


class Place(NamedTuple):
    """Where a native parameter is.

    Attributes:
        layer: Number of the layer; None outside of layers.
        name: Name in megatron-core, below `decoder.layers.N.` within a layer.
    """

    layer: int | None
    name: str

    @property
    def stacked(self) -> str:
        """Key in torch_dist where all layers are one tensor."""
        return self.name if self.layer is None else f"decoder.layers.{self.name}"

    @property
    def apart(self) -> str:
        """Key where each layer has its own tensors."""
        return self.name if self.layer is None else f"decoder.layers.{self.layer}.{self.name}"


def place_of(native: str) -> Place:
    """Return where a native parameter is in torch_dist.

    Args:
        native: Native parameter name.
    """
    match = _LAYER.fullmatch(native)
    if match is None:
        return Place(None, native)
    return Place(int(match[1]), FUSED.get(match[2], match[2]))


def extra_states(model: ResolvedModel) -> list[str]:
    """Return the keys of the states for which a model asks a torch_dist checkpoint, and which are empty without FP8.

    Layers of Transformer Engine ask for all of them, megatron-core's local layers for those of the linear layers. A
    loader overlooks what it does not ask for.

    Args:
        model: Sizes and options of the model.
    """
    modules = (*_STATEFUL, *(_NORMS if model.qk_norm else ()))
    layers = model.depth
    keys = [f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in modules for i in range(layers)]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]
