"""Optimizer parameter groups: which parameters have weight decay.

Matrices of the transformer layers have it. Norms and biases do not, and neither do the two matrices with a row per
vocabulary id: the input embedding and the output layer. A pause row is a row of those, and an optimizer decays whole
parameters; under ZeRO it gets flat slices of them. Excluding both matrices keeps decay off the pause rows exactly, at
any ZeRO stage and tensor-parallel size, with a stock optimizer and the usual checkpoint layout. Embeddings without
decay are common (OLMo 2). A separate parameter for the pause rows would need its own embedding lookup, logit columns,
and a conversion at export. Runs with and without pauses have the same groups, so that they are comparable.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer parameter groups, in the order of `model.named_parameters()`.

    Args:
        model: A PauseGPTModel.
        weight_decay: Decoupled weight decay of the matrices in transformer layers.

    Returns:
        [{"name": "decay", "params": [...], "weight_decay": w}, {"name": "no_decay", "params": [...],
        "weight_decay": 0.0}].
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[decays(parameter)].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    ]


def decays(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has weight decay: whether it is a matrix without a row per vocabulary id."""
    # megatron-core marks both vocabulary matrices (LanguageModule.setup_embeddings_and_output_layer).
    return parameter.dim() > 1 and not getattr(parameter, "is_embedding_or_output_parameter", False)
