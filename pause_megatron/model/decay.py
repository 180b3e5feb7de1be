"""Which parameters decay.

Matrices of the transformer layers do. Norms and biases do not, and neither do the two matrices that have a row per
vocabulary id: the input embedding and the output layer. A pause row is a row of those, and an optimizer decays whole
parameters; under ZeRO it sees a flat slice of them. Leaving both matrices out keeps decay off the pause rows exactly,
at any ZeRO stage and tensor-parallel size, with a stock optimizer and checkpoints of the usual layout. (Embeddings
without decay are common; OLMo 2 does the same. A separate parameter for the pause rows would instead need its own
embedding lookup, its own logit columns, and surgery at export.) Runs with and without pauses are treated alike, so they
compare.
"""

from __future__ import annotations

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer parameter groups, in the order of `model.named_parameters()`.

    Args:
        model: a PauseGPTModel.
        weight_decay: decoupled decay of the matrices in transformer layers.

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
    """Whether weight decay applies to a parameter: matrices that have no row per vocabulary id."""
    # megatron-core marks both vocabulary matrices (LanguageModule.setup_embeddings_and_output_layer).
    return parameter.dim() > 1 and not getattr(parameter, "is_embedding_or_output_parameter", False)
