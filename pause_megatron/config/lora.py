"""LoRA adapters (Hu et al. 2021): which layers and matrices have them, with native names and those of peft.

An adapted matrix W computes W x + (alpha / rank) B A x. Its adapter is two parameters beside it, `lora_a` (A,
[rank, inputs]) and `lora_b` (B, [outputs, rank]). B is split over tensor-parallel ranks as the outputs of W are, A as
its inputs are; the other one is whole on every rank. peft has an adapter for each matrix of a Hugging Face layer: those
of queries, keys and values share A, and B is cut by rows, as the matrix is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pause_megatron.config.families import LayerTensor, Piece, layer_tensors
from pause_megatron.config.layer_range import layer_range
from pause_megatron.config.model_schema import LoraSection, ResolvedModel
from pause_megatron.config.schema import ResolvedConfig

TARGETS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""Native names of the matrices, below `decoder.layers.N.`, by their names in `lora.targets`."""

LORA_A, LORA_B = "lora_a", "lora_b"
"""Names of an adapter's parameters, beside the weight and the bias of its matrix."""


def lora_of(config: ResolvedConfig) -> LoraSection | None:
    """Return the adapters that a run trains; None: it trains none.

    Args:
        config: Configuration of the run.
    """
    return config.lora if config.train.only == "lora" else None


def scale(lora: LoraSection) -> float:
    """Return the factor of an adapter's product."""
    return lora.alpha / lora.rank


def adapted_layers(lora: LoraSection, layers: int) -> range:
    """Return the numbers of the layers that have adapters, from 0 on.

    Args:
        lora: The section `lora:`.
        layers: Layers of the model.

    Raises:
        ConfigError: `lora.layers` is no range of them.
    """
    return layer_range("lora.layers", lora.layers, layers)


def adapted_tensors(model: ResolvedModel, lora: LoraSection | None, layer: int) -> Iterator[LayerTensor]:
    """Yield the parameters of one layer with its adapters, in the order of `PauseGPTModel.named_parameters()`.

    Args:
        model: Resolved sizes and options.
        lora: The adapters; None: none.
        layer: Number of the layer.

    Yields:
        The parameters; `pieces` of an adapter has peft's names without a prefix.
    """
    table = layer_tensors(model)
    adapts = lora is not None and layer in adapted_layers(lora, model.layers)
    modules = {TARGETS[target] for target in lora.targets} if lora is not None and adapts else set()
    names = {tensor.name for tensor in table}
    for tensor in table:
        yield tensor
        module, _, kind = tensor.name.rpartition(".")
        if lora is not None and module in modules and (kind == "bias" or f"{module}.bias" not in names):
            (weight,) = (one for one in table if one.name == f"{module}.weight")
            yield from _adapter(weight, module, lora.rank)


def adapters(model: ResolvedModel, lora: LoraSection, layer: int) -> tuple[LayerTensor, ...]:
    """Return only the adapters of one layer.

    Args:
        model: Resolved sizes and options.
        lora: The adapters.
        layer: Number of the layer.
    """
    return tuple(one for one in adapted_tensors(model, lora, layer) if one.name.endswith((LORA_A, LORA_B)))


def trained_parameters(config: ResolvedConfig) -> int | None:
    """Return how many parameters `train.only` trains; None: all.

    Args:
        config: Configuration of the run.
    """
    if config.train.only is None:
        return None
    model, lora = config.model, lora_of(config)
    tables = 1 if model.tied or config.pause.softmax == "exclude" else 2
    rows = tables * config.pause.embeddings * model.hidden
    if lora is None:
        return rows
    return rows + sum(one.numel for layer in range(model.layers) for one in adapters(model, lora, layer))


def _adapter(weight: LayerTensor, module: str, rank: int) -> Iterator[LayerTensor]:
    outputs, inputs = weight.shape
    names = list(dict.fromkeys(piece.name.removesuffix(".weight") for piece in weight.pieces))
    shared = tuple(Piece(f"{name}.lora_A.weight", 0, rank) for name in names)
    cut = tuple(replace(piece, name=f"{piece.name.removesuffix('.weight')}.lora_B.weight") for piece in weight.pieces)
    # A run with `train.only` has no weight decay.
    yield LayerTensor(f"{module}.{LORA_A}", (rank, inputs), 1 if weight.split == 1 else None, True, shared)
    yield LayerTensor(f"{module}.{LORA_B}", (outputs, rank), 0 if weight.split == 0 else None, True, cut)
