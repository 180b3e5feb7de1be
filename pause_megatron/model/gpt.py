"""megatron-core's GPTModel with the pause-aware head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pause_megatron.model.attention import SDPACoreAttention, additive_mask
from pause_megatron.model.head import LMLoss, OutputLayer
from pause_megatron.model.spans import TextSpans
from pause_megatron.model.vocabulary import Softmax, Vocabulary


class PauseGPTModel(GPTModel):
    """A GPTModel whose head works on the rows that have a target, and never on vocabulary padding.

    It can be called in three ways: with `targets` (the training loop of this package), with `labels` (a Megatron-LM
    script), and with neither (logits).

    Args:
        config: as GPTModel.
        transformer_layer_spec: as GPTModel; `pause_megatron.model.layers.block_spec` makes one.
        vocab_size: rows of the embedding, padding included.
        max_sequence_length: as GPTModel.
        vocabulary: which rows are text, pause and padding.
        softmax: whether pause logits stay in the softmax denominator.
        head_chunk: rows of logits that exist at one time.
        options: further arguments of GPTModel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        *,
        vocabulary: Vocabulary,
        softmax: Softmax = "keep",
        head_chunk: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(config, transformer_layer_spec, vocab_size, max_sequence_length, **options)
        self.vocabulary = vocabulary
        self._shares_mask = any(isinstance(module, SDPACoreAttention) for module in self.decoder.modules())
        group = self.pg_collection.tp
        shard = vocab_size // group.size()
        first = group.rank() * shard
        if self.post_process:
            self.output_layer = OutputLayer(
                config.hidden_size,
                vocab_size,
                masked=vocabulary.masked_columns(softmax, first, first + shard),
                chunk=head_chunk,
                embedding=self.embedding.word_embeddings if self.share_embeddings_and_output_weights else None,
                config=config,
                init_method=config.init_method,
                gather_output=not self.parallel_output,
                tp_group=group,
            )
            self.setup_embeddings_and_output_layer()
        self._register_state_dict_hook(_drop_empty_extra_state)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | TextSpans | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        target_rows: Tensor | None = None,
        targets: Tensor | None = None,
        loss_scale: Tensor | float = 1.0,
        loss_mask: Tensor | None = None,
        **options: Any,
    ) -> LMLoss | Tensor:
        """Loss over the targets, losses per token, or logits.

        Args:
            input_ids, position_ids: [batch, seq] int64. Rotary positions are 0, 1, 2, ... without an attention mask,
                else those of position_ids, which may start anew within a window.
            attention_mask: TextSpans; or bool [batch, 1, seq, seq], True where a query must not look; None: causal.
            decoder_input: as GPTModel.
            labels: [batch, seq] int64, for Megatron-LM's own loss function.
            target_rows: [targets] int64, ascending: which rows of the sequence-first flattening (row = position * batch
                + sample) have a target.
            targets: [targets] int64: the ids that those rows predict.
            loss_scale: what the sum of token losses is multiplied with.
            loss_mask: [batch, seq], with `labels`: no logits are computed where it is 0.
            options: further arguments of GPTModel.forward, of whichever release.

        Returns:
            With `targets`, an LMLoss. With `labels`, token losses [batch, seq] fp32, 0 where loss_mask is 0. Else
            logits [batch, seq, vocabulary shard], padding columns included.
        """
        if attention_mask is None and self.position_embedding_type == "rope" and not _is_inference(options):
            position_ids = None
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool and self._shares_mask:
            attention_mask = additive_mask(attention_mask, self.config.params_dtype)
        hidden = super().forward(input_ids, position_ids, attention_mask, decoder_input, **options)
        if not self.post_process or _is_inference(options):
            return hidden
        if targets is not None:
            return self._loss(hidden, target_rows, targets, loss_scale)
        if labels is not None:
            return self._token_losses(hidden, labels, loss_mask)
        logits, _ = self.output_layer(hidden, runtime_gather_output=options.get("runtime_gather_output"))
        return logits.transpose(0, 1).contiguous()

    def logits(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | TextSpans | None = None) -> Tensor:
        """Logits of all live ids, gathered from all tensor-parallel ranks: [batch, seq, vocabulary.size] fp32."""
        logits = self(tokens, position_ids, attention_mask, runtime_gather_output=True)
        return logits[..., : self.vocabulary.size].float()

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor | None, *args: Any, **kwargs: Any) -> tuple:
        # GPTModel ignores position_ids where positions are rotary: one table [seq, 1, 1, channels] for all windows.
        hidden, rotary, *others = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        restarting = position_ids is not None and self.position_embedding_type == "rope"
        if restarting and rotary is not None and kwargs.get("inference_context") is None:
            rotary = rotary[:, 0, 0][position_ids].transpose(0, 1).unsqueeze(2)
        return hidden, rotary, *others

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # GPTModel.forward ends here. The head comes after it, in our forward.
        if kwargs.get("inference_context") is not None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        return hidden_states

    def _loss(self, hidden: Tensor, target_rows: Tensor, targets: Tensor, loss_scale: Tensor | float) -> LMLoss:
        if not isinstance(loss_scale, Tensor):
            loss_scale = torch.full((), loss_scale, dtype=torch.float32, device=hidden.device)
        rows = self._rows(hidden, target_rows)
        loss, total, token_losses = self.output_layer(rows, targets=targets, loss_scale=loss_scale)
        return LMLoss(loss, total, targets.shape[0], token_losses)

    def _token_losses(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None) -> Tensor:
        batch, seq = labels.shape
        labels = labels.t().reshape(-1)
        kept = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask.t().reshape(-1) != 0
        kept = kept.nonzero().squeeze(1)
        (losses,) = self.output_layer(self._rows(hidden, kept), targets=labels[kept])
        everywhere = losses.new_zeros(seq * batch).index_copy(0, kept, losses)
        return everywhere.view(seq, batch).t().contiguous()

    def _rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[seq or its part, batch, hidden] -> [rows, hidden], whose gradients are summed over tensor-parallel ranks."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
            return hidden.view(-1, hidden.shape[-1]).index_select(0, rows)
        selected = hidden.view(-1, hidden.shape[-1]).index_select(0, rows)
        return copy_to_tensor_model_parallel_region(selected, group=group)


def _is_inference(options: dict[str, Any]) -> bool:
    return options.get("inference_context") is not None or options.get("inference_params") is not None


def _drop_empty_extra_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    # Transformer Engine's place in megatron-core's linear layers: None here, and in the way of checkpoint converters.
    for key in [key for key, value in state.items() if key.endswith("_extra_state") and value is None]:
        del state[key]
