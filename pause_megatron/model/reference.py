"""The plain way to the loss: all logits at once, masked afterwards. What the head is compared with."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pause_megatron.model.gpt import PauseGPTModel
from pause_megatron.model.head import mask_columns


def reference_token_losses(
    model: PauseGPTModel,
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Losses of all positions by megatron-core's output layer and `vocab_parallel_cross_entropy`.

    The caller multiplies with its loss mask; every label must be an id that takes part in the softmax.

    Args:
        model: its own head is not used, its weights are.
        tokens, position_ids, labels: [batch, seq] int64.
        attention_mask: bool [batch, 1, seq, seq], True where a query must not look; None: causal.

    Returns:
        [batch, seq] fp32.
    """
    hidden = GPTModel.forward(model, tokens, position_ids, attention_mask)
    logits, _ = model.output_layer(hidden, runtime_gather_output=False)
    return model.compute_language_model_loss(labels, mask_columns(logits, model.output_layer.masked))
