"""A GPT composed of megatron-core's public modules, with an LM head that skips masked targets.

It is composed as megatron-core's own models are (embedding, rotary embedding, TransformerBlock, output layer under
LanguageModule), with their parameter names. It does not inherit from GPTModel, which megatron-core 0.19 deprecates: the
head would have to override private methods.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from pause_megatron.model.attention import MaskAndRotation, Rotation, SDPACoreAttention, additive_mask
from pause_megatron.model.auxiliary import AuxiliaryHeads, Hints
from pause_megatron.model.head import LMLoss, OutputLayer
from pause_megatron.model.kernels import Kernels, load_kernels
from pause_megatron.model.layers import loop, use_swiglu
from pause_megatron.model.unsupported import check_loops, check_supported
from pause_megatron.model.variable_length import PackedSegments
from pause_megatron.model.vocabulary import Softmax, Vocabulary
from pause_megatron.objective import Steps

PositionEmbedding = Literal["rope", "learned_absolute", "none"]
AttentionMask = Tensor | PackedSegments


class PauseGPTModel(LanguageModule):
    """A GPT whose head computes only the rows that have a target, and masks vocabulary padding out of the softmax.

    It is called with `targets` (by this package's training loop), with `labels` (by a Megatron-LM script), or with
    neither (logits). Where every position has a target and no row is padding, losses and gradients are those of
    megatron-core's GPTModel, on a CPU bit for bit.

    Args:
        config: As GPTModel.
        transformer_layer_spec: As GPTModel; `pause_megatron.model.layers.block_spec` makes one.
        vocab_size: Rows of the embedding, padding included.
        max_sequence_length: As GPTModel.
        pre_process: Whether this pipeline stage has the embedding.
        post_process: Whether this pipeline stage has the head.
        fp16_lm_cross_entropy: Must be False.
        parallel_output: Whether logits stay sharded over tensor-parallel ranks.
        share_embeddings_and_output_weights: Tied embeddings.
        position_embedding_type: "rope", "learned_absolute" or "none".
        rotary_percent: As GPTModel.
        rotary_base: As GPTModel.
        rope_scaling: As GPTModel.
        rope_scaling_factor: As GPTModel.
        seq_len_interpolation_factor: As GPTModel.
        mtp_block_spec: Must be None.
        pg_collection: Process groups; default: those of `megatron.core.parallel_state`.
        vp_stage: Virtual pipeline stage.
        vocabulary: Text, pause and padding rows.
        softmax: Whether pause logits are kept in the softmax denominator.
        head_chunk: Rows of logits that exist at one time; None: by memory (`config.presets.head_chunk_rows`).
        kernels: Kernels of rotary embedding, SwiGLU (where the config has `use_te_activation_func`) and cross-entropy;
            default: plain.
        loops: How many times a forward pass runs through the layers, with the same weights.
        loop_layers: Numbers of the layers that repeat; those before and after them run once. None: all.
        auxiliary_heads: Number of auxiliary heads, for hints.
        given_positions: Whether rotary positions are always position_ids (`pause.positions=shared`); False: only where
            there is an attention mask.

    Raises:
        ConfigError: The configuration has a feature of GPTModel that is not supported: multi-token prediction,
            multi-latent attention, MuP, YaRN or multimodal positions, a 16-bit cross-entropy, deferred embedding
            gradients, given positions under context parallelism.
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
        rotary_base: float = 10000,
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
        loops: int = 1,
        loop_layers: range | None = None,
        auxiliary_heads: int = 0,
        given_positions: bool = False,
    ) -> None:
        check_supported(config, position_embedding_type, fp16_lm_cross_entropy, mtp_block_spec, given_positions)
        check_loops(loops, loop_layers, config, whole=pre_process and post_process)
        super().__init__(config, pg_collection)
        self.vocabulary = vocabulary
        self.kernels = kernels or load_kernels("plain", "cpu")
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.pre_process = pre_process
        self.post_process = post_process
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.given_positions = given_positions
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron-LM's training loop
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
        if loops > 1:
            loop(self.decoder, loops, range(config.num_layers) if loop_layers is None else loop_layers)
        self._shares_mask = any(isinstance(module, SDPACoreAttention) for module in self.decoder.modules())
        self._rotates_in_core = (
            self.kernels.fused
            and self.rotary_pos_emb is not None
            and not config.rotary_interleaved
            and rotary_percent == 1.0
            and not config.recompute_granularity  # megatron-core's recomputation supports tensors only
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
        self.auxiliary_heads = AuxiliaryHeads(auxiliary_heads, config) if post_process and auxiliary_heads else None
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        for name, module in self.named_modules():
            if hasattr(module, "finish_init"):  # required by Transformer Engine's layers
                module.finish_init(get_quant_config_or_none(name, config.quant_recipe))
        self.register_state_dict_post_hook(_drop_empty_extra_state)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: AttentionMask | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        target_rows: Tensor | None = None,
        targets: Tensor | None = None,
        loss_scale: Tensor | float = 1.0,
        hints: Hints | None = None,
        steps: Steps | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
        **others: None,
    ) -> LMLoss | Tensor:
        """Compute the loss of the targets, the loss of each token, or logits.

        Args:
            input_ids: int64 [batch, seq].
            position_ids: int64 [batch, seq]. Rotary positions are these where there is an attention mask, and with
                `given_positions`; they may repeat, and restart within a window. Otherwise they are 0, 1, 2, ...
                Attention and its sliding window go by the order of tokens.
            attention_mask: PackedSegments; or bool [batch, 1, seq, seq], True where a query must not attend; None:
                causal.
            decoder_input: Replaces the output of the embedding, [seq, batch, hidden].
            labels: int64 [batch, seq], for Megatron-LM's own loss function.
            target_rows: Rows that have a target, in the sequence-first flattening (row = position * batch + sample),
                int64 [targets], ascending.
            targets: Target ids of those rows, int64 [targets].
            loss_scale: Factor of the sum of token losses.
            hints: With `targets`: further targets, at pauses or for the auxiliary heads.
            steps: With `targets`: their rows for the objective of the output layer, in place of `target_rows`.
            loss_mask: With `labels`: no logits are computed where it is 0, [batch, seq].
            packed_seq_params: As GPTModel, for the TransformerBlock.
            extra_block_kwargs: As GPTModel, for the TransformerBlock.
            runtime_gather_output: Whether logits are gathered from tensor-parallel ranks; default: not parallel_output.
            **others: Further arguments of GPTModel.forward, which must be None.

        Returns:
            With `targets`, an LMLoss. With `labels`, token losses fp32 [batch, seq], 0 where loss_mask is 0. Otherwise
            logits [batch, seq, vocabulary shard], padding columns included. On a pipeline stage without the head,
            hidden states [seq, batch, hidden].

        Raises:
            TypeError: An argument that is not supported (for inference contexts, export the model).
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
            if target_rows is None:
                raise TypeError("PauseGPTModel.forward: expected target_rows with targets, got None")
            return self._loss(hidden, target_rows if steps is None else steps.rows, targets, loss_scale, hints, steps)
        if labels is not None:
            return self._token_losses(hidden, labels, loss_mask)
        logits, _ = self.output_layer(hidden, runtime_gather_output=runtime_gather_output)
        return logits.transpose(0, 1).contiguous()

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: AttentionMask | None = None,
        decoder_input: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Compute the input of the head.

        Args:
            input_ids: As in `forward`.
            position_ids: As in `forward`.
            attention_mask: As in `forward`.
            decoder_input: As in `forward`.
            packed_seq_params: As in `forward`.
            extra_block_kwargs: As in `forward`.

        Returns:
            [seq, batch, hidden], or under sequence parallelism this rank's part of the sequence.
        """
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids, position_ids)
        mask: AttentionMask | MaskAndRotation | None = attention_mask
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool and self._shares_mask:
            mask = attention_mask = additive_mask(attention_mask, self.config.params_dtype)
        given = self.given_positions or attention_mask is not None
        if self.given_positions and packed_seq_params is not None:  # megatron-core rotates by index within cu_seqlens
            raise TypeError("PauseGPTModel.forward: expected no packed_seq_params with given_positions; use a mask")
        angles = self._rotary(decoder_input, position_ids if given else None, packed_seq_params)
        if self._rotates_in_core and angles is not None:
            mask, angles = MaskAndRotation(attention_mask, Rotation.of(angles, self.kernels.rotate)), None
        return self.decoder(
            hidden_states=decoder_input,
            attention_mask=mask,
            rotary_pos_emb=angles,
            packed_seq_params=packed_seq_params,
            **(extra_block_kwargs or {}),
        )

    def logits(self, tokens: Tensor, position_ids: Tensor, attention_mask: AttentionMask | None = None) -> Tensor:
        """Compute the logits of all live ids, gathered from all tensor-parallel ranks.

        Args:
            tokens: int64 [batch, seq].
            position_ids: int64 [batch, seq].
            attention_mask: As `forward`.

        Returns:
            fp32 [batch, seq, vocabulary.size].
        """
        logits = self(tokens, position_ids, attention_mask, runtime_gather_output=True)
        return logits[..., : self.vocabulary.size].float()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the hidden states of the previous pipeline stage, for megatron-core's pipeline schedules."""
        (hidden,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(hidden)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the sharded state as GPTModel does, without an extra state of the output layer."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state

    def _rotary(
        self, hidden: Tensor | None, position_ids: Tensor | None, packed_seq_params: PackedSeqParams | None
    ) -> Tensor | None:
        """Return rotary angles [seq, 1, 1, channels] of positions 0, 1, 2, ..., or [seq, batch, 1, channels] of ids."""
        if self.rotary_pos_emb is None:
            return None
        length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, hidden, self.config, packed_seq_params)
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        angles = self.rotary_pos_emb(length, packed_seq=packed)
        if position_ids is None or self.config.context_parallel_size > 1:
            return angles  # a context-parallel rank has the angles of its part
        return angles[:, 0, 0][position_ids].transpose(0, 1).unsqueeze(2)

    def _loss(
        self,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        loss_scale: Tensor | float,
        hints: Hints | None,
        steps: Steps | None,
    ) -> LMLoss:
        if not isinstance(loss_scale, Tensor):
            loss_scale = torch.full((), loss_scale, dtype=torch.float32, device=hidden.device)
        count = targets.shape[0]
        if hints is None and self.auxiliary_heads is None:
            selected = self._rows(hidden, rows)
            loss, total, losses, *rest = self.output_layer(
                selected, targets=targets, loss_scale=loss_scale, steps=steps
            )
            return LMLoss(loss, total, count, losses, None, *rest)
        if hints is None:  # the heads run all the same: under ZeRO-3 all ranks gather their weight together
            hints = Hints(rows[:0], targets[:0])
        selected = self._rows(hidden, torch.cat([rows, hints.rows]), rows.shape[0], hints.by_head)
        loss, total, losses, *rest = self.output_layer(
            selected,
            targets=torch.cat([targets, hints.targets]),
            loss_scale=loss_scale,
            hints=hints.targets.shape[0],
            hint_weight=hints.weight,
            steps=steps,
        )
        return LMLoss(loss, total, count, losses[:count], losses[count:], *rest)

    def _token_losses(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None) -> Tensor:
        batch, seq = labels.shape
        labels = labels.t().reshape(-1)
        kept = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask.t().reshape(-1) != 0
        kept = kept.nonzero().squeeze(1)
        (losses,) = self.output_layer(self._rows(hidden, kept, kept.shape[0]), targets=labels[kept])
        everywhere = losses.new_zeros(seq * batch).index_copy(0, kept, losses)
        return everywhere.view(seq, batch).t().contiguous()

    def _rows(self, hidden: Tensor, rows: Tensor, answers: int = 0, by_head: Sequence[int] = ()) -> Tensor:
        """Select rows of the hidden states, [rows, hidden]; their gradient is summed over tensor-parallel ranks.

        Args:
            hidden: As `hidden_states` returns them.
            rows: Rows in the sequence-first flattening.
            answers: Rows before those of the auxiliary heads.
            by_head: Rows of each auxiliary head.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        selected = hidden.view(-1, hidden.shape[-1]).index_select(0, rows)
        if self.auxiliary_heads is not None:
            selected = torch.cat([selected[:answers], self.auxiliary_heads(selected[answers:], by_head)])
        if self.config.sequence_parallel:
            return selected
        return copy_to_tensor_model_parallel_region(selected, group=group)


def _drop_empty_extra_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    # Transformer Engine's key in megatron-core's linear layers. It is None here, and checkpoint converters reject it.
    for key in [key for key, value in state.items() if key.endswith("_extra_state") and value is None]:
        del state[key]
