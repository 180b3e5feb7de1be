"""Losses and entropies of a transformers model at each token, without keeping the logits of a batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

_LOGITS = 1 << 24
"""Logits that are in memory at a time, in fp32: 64 MiB."""


class Scorer:
    """The values of tokens that follow others.

    Hidden states go through the LM head in chunks of rows. A model whose logits are not those of its LM head alone (a
    soft cap, a scale) computes its own, for the whole batch.

    Args:
        model: A transformers causal language model in eval mode.
        pauses: Ids of its pauses, which are never emitted: their logits take no part.
        kind: "loss" (of the token that follows) or "entropy" (of the prediction of that token), in nats.
    """

    def __init__(self, model: Any, pauses: range, kind: Literal["loss", "entropy"]) -> None:
        self._model, self._kind = model, kind
        self._pauses = torch.tensor(list(pauses), dtype=torch.int64, device=model.device)
        self._head = self._plain_head()

    @torch.inference_mode()
    def values(self, inputs: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
        """Return the value of each scored target, row by row, fp32 [scored], on the CPU.

        Shorter rows are padded on the right, where causal attention does not let other tokens see the padding.

        Args:
            inputs: Token ids, int64 [batch, tokens].
            targets: The id that follows each of them, int64 [batch, tokens].
            scored: Whether a target gets a value, bool [batch, tokens]. The LM head is computed for these only.
        """
        device = self._model.device
        inputs, scored = inputs.to(device), scored.to(device)
        targets = targets.to(device)[scored]
        if self._head is None:
            rows = self._model(input_ids=inputs, use_cache=False).logits[scored]
        else:
            rows = self._model.base_model(input_ids=inputs, use_cache=False)[0][scored]
        size = max(1, _LOGITS // self._model.get_input_embeddings().weight.shape[0])
        found = torch.empty(len(rows), dtype=torch.float32, device=device)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            logits = (part if self._head is None else self._head(part)).float()
            found[start : start + size] = self._reduce(logits, targets[start : start + size])
        return found.cpu()

    def _reduce(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the value of each row of logits [rows, vocab]."""
        if len(self._pauses):
            logits.index_fill_(1, self._pauses, torch.finfo(logits.dtype).min)  # made for this chunk alone
        if self._kind == "loss":
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        log_probabilities = logits.log_softmax(dim=1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=1)

    @torch.inference_mode()
    def _plain_head(self) -> Any:
        """Return the LM head if the model's logits are its output on the last hidden states; else None."""
        head = self._model.get_output_embeddings()
        if head is None or self._model.base_model is self._model:
            return None
        ids = torch.arange(16, device=self._model.device)[None] % self._model.get_input_embeddings().weight.shape[0]
        own = self._model(input_ids=ids, use_cache=False).logits.float()
        plain = head(self._model.base_model(input_ids=ids, use_cache=False)[0]).float()
        if plain.shape != own.shape:
            return None
        scale = float(own.nan_to_num().abs().max())
        return head if torch.allclose(plain, own, rtol=1e-5, atol=1e-5 * scale, equal_nan=True) else None
