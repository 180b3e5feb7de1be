"""A GPT of megatron-core's public parts with the pause-aware head.

Composed as megatron-core's own models are (embedding, rotary positions, TransformerBlock, output layer under
LanguageModule), with their parameter names. It does not inherit from GPTModel, which megatron-core 0.19 deprecates: the
head would have to replace private methods of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pause_megatron.errors import ConfigError
from pause_megatron.model.attention import MaskAndRotation, Rotation, SDPACoreAttention, additive_mask
from pause_megatron.model.head import LMLoss, OutputLayer
from pause_megatron.model.kernels import Kernels
from pause_megatron.model.kernels import kernels as kernels_named
from pause_megatron.model.layers import use_swiglu
from pause_megatron.model.spans import TextSpans
from pause_megatron.model.vocabulary import Softmax, Vocabulary

PositionEmbedding = Literal["rope", "learned_absolute", "none"]


class PauseGPTModel(LanguageModule):
    """A GPT whose head computes the rows that have a target only, and leaves vocabulary padding out of the softmax.

    It can be called in three ways: with `targets` (the training loop of this package), with `labels` (a Megatron-LM
    script), and with neither (logits). Where every position has a target and no row is padding, losses and gradients
    are those of megatron-core's GPTModel, on a CPU bit for bit.

    Args:
        config: as GPTModel.
        transformer_layer_spec: as GPTModel; `pause_megatron.model.layers.block_spec` makes one.
        vocab_size: rows of the embedding, padding included.
        max_sequence_length: as GPTModel.
        vocabulary: which rows are text, pause and padding.
        softmax: whether pause logits stay in the softmax denominator.
        head_chunk: rows of logits that exist at one time; None: by memory (`config.presets.head_chunk_rows`).
        pre_process, post_process: whether this pipeline stage has the embedding, and the head.
        parallel_output: keep logits split over tensor-parallel ranks.
        kernels: of rotary embedding, SwiGLU (where the config has `use_te_activation_func`) and cross-entropy;
            default: plain.
        share_embeddings_and_output_weights: tied embeddings.
        position_embedding_type: "rope", "learned_absolute" or "none".
        rotary_percent, rotary_base, rope_scaling, rope_scaling_factor, seq_len_interpolation_factor: as GPTModel.
        pg_collection: process groups; default: those of `megatron.core.parallel_state`.
        vp_stage: virtual pipeline stage.
        fp16_lm_cross_entropy, mtp_block_spec: arguments of GPTModel that must be off.

    Raises:
        ConfigError: something of GPTModel's that this model does not have: multi-token prediction, multi-latent
            attention, MuP, YaRN or multimodal positions, a 16-bit cross-entropy, deferred embedding gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: PositionEmbedding = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: int = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        seq_len_interpolation_factor: float | None = None,
        mtp_block_spec: None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        *,
        vocabulary: Vocabulary,
        softmax: Softmax = "keep",
        head_chunk: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        _refuse(config, position_embedding_type, fp16_lm_cross_entropy, mtp_block_spec)
        super().__init__(config, pg_collection)
        self.vocabulary = vocabulary
        self.kernels = kernels or kernels_named("plain", "cpu")
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.pre_process = pre_process
        self.post_process = post_process
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder  # Megatron-LM's training loop asks for it
        groups = self.pg_collection
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                max_sequence_length,
                position_embedding_type=position_embedding_type,
                tp_group=groups.tp,
            )
        self.rotary_pos_emb = None
        if position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                config.kv_channels,
                rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                seq_len_interpolation_factor=seq_len_interpolation_factor,
                rotary_base=rotary_base,
                rope_scaling=rope_scaling,
                rope_scaling_factor=rope_scaling_factor,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=groups.cp,
            )
        self.decoder = TransformerBlock(
            config,
            transformer_layer_spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self._shares_mask = any(isinstance(module, SDPACoreAttention) for module in self.decoder.modules())
        self._rotates_in_core = (
            self.kernels.fused
            and self.rotary_pos_emb is not None
            and not config.rotary_interleaved
            and rotary_percent == 1.0
            and not config.recompute_granularity  # megatron-core's own keeps tensors only, and a mask that is one
            and all(isinstance(layer.self_attention.core_attention, SDPACoreAttention) for layer in self.decoder.layers)
        )
        if self.kernels.fused:
            use_swiglu(self.decoder, self.kernels.swiglu)
        if post_process:
            shard = vocab_size // groups.tp.size()
            first = groups.tp.rank() * shard
            tied = share_embeddings_and_output_weights and pre_process
            self.output_layer = OutputLayer(
                config.hidden_size,
                vocab_size,
                masked=vocabulary.masked_columns(softmax, first, first + shard),
                chunk=head_chunk,
                kernels=self.kernels,
                embedding=self.embedding.word_embeddings if tied else None,
                config=config,
                init_method=config.init_method,
                gather_output=not parallel_output,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        for name, module in self.named_modules():
            if hasattr(module, "finish_init"):  # Transformer Engine's layers, which wait for it
                module.finish_init(get_quant_config_or_none(name, config.quant_recipe))
        self.register_state_dict_post_hook(_drop_empty_extra_state)

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
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
        **others: None,
    ) -> LMLoss | Tensor:
        """Loss over the targets, losses per token, or logits.

        Args:
            input_ids, position_ids: [batch, seq] int64. Rotary positions are 0, 1, 2, ... without an attention mask,
                else those of position_ids, which may start anew within a window.
            attention_mask: TextSpans; or bool [batch, 1, seq, seq], True where a query must not look; None: causal.
            decoder_input: [seq, batch, hidden] in place of the embedding's output.
            labels: [batch, seq] int64, for Megatron-LM's own loss function.
            target_rows: [targets] int64, ascending: which rows of the sequence-first flattening (row = position * batch
                + sample) have a target.
            targets: [targets] int64: the ids that those rows predict.
            loss_scale: what the sum of token losses is multiplied with.
            loss_mask: [batch, seq], with `labels`: no logits are computed where it is 0.
            packed_seq_params, extra_block_kwargs: for the TransformerBlock, as GPTModel.
            runtime_gather_output: gather logits from tensor-parallel ranks; default: not parallel_output.
            others: further arguments of GPTModel.forward, which must be None.

        Returns:
            With `targets`, an LMLoss. With `labels`, token losses [batch, seq] fp32, 0 where loss_mask is 0. Else
            logits [batch, seq, vocabulary shard], padding columns included. On a pipeline stage without the head,
            hidden states [seq, batch, hidden].

        Raises:
            TypeError: an argument that this model does not have (inference contexts: export the model instead).
        """
        for name, value in others.items():
            if value is not None:
                raise TypeError(f"PauseGPTModel.forward: expected no argument {name!r}, got a {type(value).__name__}")
        hidden = self.hidden_states(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input,
            packed_seq_params=packed_seq_params,
            extra_block_kwargs=extra_block_kwargs,
        )
        if not self.post_process:
            return hidden
        if targets is not None:
            return self._loss(hidden, target_rows, targets, loss_scale)
        if labels is not None:
            return self._token_losses(hidden, labels, loss_mask)
        logits, _ = self.output_layer(hidden, runtime_gather_output=runtime_gather_output)
        return logits.transpose(0, 1).contiguous()

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | TextSpans | None = None,
        decoder_input: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """What the head works on: [seq, batch, hidden], or this rank's part of the sequence. Arguments as `forward`."""
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids, position_ids)
        restarting = attention_mask is not None
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool and self._shares_mask:
            attention_mask = additive_mask(attention_mask, self.config.params_dtype)
        angles = self._rotary(decoder_input, position_ids if restarting else None, packed_seq_params)
        if self._rotates_in_core:
            attention_mask, angles = MaskAndRotation(attention_mask, Rotation.of(angles, self.kernels.rotate)), None
        return self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            rotary_pos_emb=angles,
            packed_seq_params=packed_seq_params,
            **(extra_block_kwargs or {}),
        )

    def logits(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | TextSpans | None = None) -> Tensor:
        """Logits of all live ids, gathered from all tensor-parallel ranks: [batch, seq, vocabulary.size] fp32."""
        logits = self(tokens, position_ids, attention_mask, runtime_gather_output=True)
        return logits[..., : self.vocabulary.size].float()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states that megatron-core's pipeline schedules got from the stage before."""
        (hidden,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(hidden)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As GPTModel: the output layer has no extra state in checkpoints of megatron-core's."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state

    def _rotary(
        self, hidden: Tensor | None, position_ids: Tensor | None, packed_seq_params: PackedSeqParams | None
    ) -> Tensor | None:
        """Rotary angles [seq, 1, 1, channels] of positions 0, 1, 2, ..., or [seq, batch, 1, channels] of given ones."""
        if self.rotary_pos_emb is None:
            return None
        length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, hidden, self.config, packed_seq_params)
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        angles = self.rotary_pos_emb(length, packed_seq=packed)
        if position_ids is None or self.config.context_parallel_size > 1:
            return angles  # a context-parallel rank has the angles of its part only
        return angles[:, 0, 0][position_ids].transpose(0, 1).unsqueeze(2)

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


def _refuse(config: TransformerConfig, position_embedding_type: str, fp16_loss: bool, mtp_block_spec: object) -> None:
    """Raise a ConfigError for what GPTModel has and this model does not."""
    positions = ("rope", "learned_absolute", "none")
    if position_embedding_type not in positions:
        raise ConfigError(f"position_embedding_type: expected one of {positions}, got {position_embedding_type!r}")
    if fp16_loss:
        raise ConfigError("fp16_lm_cross_entropy: expected False, got True: the loss of PauseGPTModel is fp32")
    if mtp_block_spec is not None:
        raise ConfigError("mtp_block_spec: expected None, got a spec: PauseGPTModel has no multi-token prediction")
    for name in ("multi_latent_attention", "mtp_num_layers", "use_mup", "defer_embedding_wgrad_compute"):
        if value := getattr(config, name, None):
            raise ConfigError(f"{name}: expected it to be off for PauseGPTModel, got {value!r}")


def _drop_empty_extra_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    # Transformer Engine's place in megatron-core's linear layers: None here, and in the way of checkpoint converters.
    for key in [key for key, value in state.items() if key.endswith("_extra_state") and value is None]:
        del state[key]
