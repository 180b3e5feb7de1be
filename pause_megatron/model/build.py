"""Building the model from the run's configuration, with initial weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pause_megatron.config.model_schema import LoraSection, ModelSection, ResolvedModel
from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.model.gpt import PauseGPTModel
from pause_megatron.model.init import initialize_weights
from pause_megatron.model.kernels import KernelChoice, load_kernels
from pause_megatron.model.layers import block_spec
from pause_megatron.model.lora import add_adapters
from pause_megatron.model.rotary import inverse_frequencies, softmax_scale
from pause_megatron.model.sequence_parallel import check_gradient_sums, sum_gradients_over
from pause_megatron.model.vocabulary import Softmax, Vocabulary
from pause_megatron.objective import Objective


def build_model(
    model: ModelSection,
    *,
    vocabulary: Vocabulary,
    sequence_length: int,
    parallel: ParallelSection,
    softmax: Softmax = "keep",
    precision: str = "fp32",
    seed: int = 0,
    kernels: KernelChoice = "auto",
    draw: bool = True,
    auxiliary_heads: int = 0,
    lora: LoraSection | None = None,
    objective: Objective | None = None,
    given_positions: bool = False,
) -> PauseGPTModel:
    """Build this rank's shard of a Llama-like model on the current CUDA device, or on the CPU where there is none.

    Process groups must exist (`pause_megatron.distributed.initialize`). The hooks that sum gradients of
    tensor-parallel ranks are registered and checked.

    Args:
        model: Sizes of the model.
        vocabulary: Text and pause ids.
        sequence_length: Tokens of a window.
        parallel: Tensor and sequence parallelism, recomputation.
        softmax: "keep" or "exclude" pause logits.
        precision: "fp32" or "bf16" parameters.
        seed: Seed of the initial weights, which do not depend on the number of ranks or on padding.
        kernels: As `engine.kernels`.
        draw: False leaves the weights uninitialized, for a model that is about to be loaded. Auxiliary heads begin at 0
            in either case.
        auxiliary_heads: Number of auxiliary heads, for the hints of a finetuning.
        lora: Adapters, which are initialized in either case; None: none.
        objective: What is minimized; None: the cross-entropy.
        given_positions: Whether rotary positions are always position_ids (`pause.positions=shared`).

    Raises:
        ConfigError: A size is missing or not divisible by the tensor-parallel size.
    """
    model = check_shape(model, parallel, sequence_length)
    group = parallel_state.get_tensor_model_parallel_group()
    loaded = load_kernels(kernels, torch.cuda.current_device())
    gpt = PauseGPTModel(
        transformer_config(model, parallel, precision, fused=loaded.fused),
        block_spec(
            model.layers,
            attention=model.attention,
            recompute=parallel.recompute,
            qk_norm=model.qk_norm,
            norm=model.norm,
            proj_bias=model.proj_bias,
            mlp_bias=model.mlp_bias,
            windows=[model.window_of(layer) for layer in range(model.layers)],
        ),
        vocabulary.padded(model.vocab_multiple, parallel.tensor),
        sequence_length,
        vocabulary=vocabulary,
        softmax=softmax,
        head_chunk=model.head_chunk,
        kernels=loaded,
        loops=model.loops,
        loop_layers=model.looped,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        auxiliary_heads=auxiliary_heads,
        given_positions=given_positions,
    )
    gpt.output_layer.objective, gpt.output_layer.pause_ids = objective, vocabulary.pause_ids
    if model.rope_scaling is not None:
        rotary: Any = gpt.rotary_pos_emb
        rotary.inv_freq = inverse_frequencies(model).to(rotary.inv_freq.device)
    if draw:
        initialize_weights(
            gpt,
            seed=seed,
            std=model.init_std,
            layers=model.depth,
            vocabulary=vocabulary,
            rank=group.rank(),
            ranks=group.size(),
        )
    if lora is not None:
        add_adapters(gpt, lora, seed=seed)
    if group.size() > 1:
        sum_gradients_over(gpt, group)
        check_gradient_sums(gpt, group)
    return gpt


def transformer_config(
    model: ResolvedModel, parallel: ParallelSection, precision: str, *, fused: bool = False
) -> TransformerConfig:
    """Return megatron-core's configuration of the model; fusions that need CUDA extensions are off.

    Args:
        model: Sizes of the model.
        parallel: Tensor and sequence parallelism.
        precision: "fp32" or "bf16".
        fused: Whether the model's own SwiGLU replaces megatron-core's (`layers.use_swiglu`).
    """
    bf16 = precision == "bf16"
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn,
        kv_channels=model.channels,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm is not None,
        softmax_scale=softmax_scale(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        use_te_activation_func=fused and model.attention == "sdpa",
        # init.py fills the weights, which are allocated on `torch.cuda.current_device()` (without CUDA: the CPU).
        # megatron-core marks them as tensor parallel, for DeepSpeed. Its CPU initialization would allocate whole fp32
        # matrices.
        use_cpu_initialization=False,
        init_method=_uninitialized,
        output_layer_init_method=_uninitialized,
        embedding_init_method=_uninitialized,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _uninitialized(weight: Tensor) -> Tensor:
    return weight
