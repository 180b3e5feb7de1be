"""Sizes of a run on one rank, from which memory, communication and time follow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pause_megatron.config.batching import BatchPlan, batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.lora import lora_of
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.pauses import OBJECTIVES
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.plan.shapes import Parameter, padded_vocabulary, rank_parameters

FALLBACK_BUCKET = 500_000_000  # elements of a DeepSpeed reduction where no reduce_bucket_size applies
_OF_OWN_HEADS = ("q_layernorm.weight", "k_layernorm.weight")
Device = Literal["cuda", "cpu"]
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """A configuration on a number of ranks.

    Attributes:
        config: Resolved configuration.
        batch: Its batches on these ranks.
        engine: Its complete DeepSpeed dictionary.
        vocabulary: Live rows of the vocabulary, text and pauses.
    """

    config: ResolvedConfig
    batch: BatchPlan
    engine: dict[str, Any]
    vocabulary: int

    @classmethod
    def of(cls, config: ResolvedConfig, world_size: int, text_size: int) -> Layout:
        """Return the layout of a configuration.

        Args:
            config: Resolved configuration.
            world_size: Ranks in all.
            text_size: Ids of the text vocabulary.

        Raises:
            ConfigError: The ranks or the batch do not divide, or the DeepSpeed file cannot be used.
        """
        batch = batch_plan(config, world_size)
        engine = deepspeed_config(config, data_parallel=batch.data_parallel)
        return cls(config, batch, engine, text_size + config.pause.embeddings)

    @property
    def model(self) -> ResolvedModel:
        """The model section of the configuration."""
        return self.config.model

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.batch.tensor

    @property
    def data_parallel(self) -> int:
        """Data-parallel size."""
        return self.batch.data_parallel

    @property
    def sequence_split(self) -> int:
        """Parts into which sequence parallelism splits norms and residuals."""
        return self.tensor if self.config.parallel.sequence else 1

    @property
    def recompute(self) -> bool:
        """Whether the backward pass recomputes each layer."""
        return self.config.parallel.recompute == "full"

    @property
    def element(self) -> int:
        """Bytes of an element of weights and activations."""
        return ELEMENT_BYTES[self.config.engine.precision]

    @property
    def fused(self) -> bool:
        """Whether rotary embedding, SwiGLU and cross-entropy are one fused kernel each on a GPU."""
        return self.fused_on("cuda")

    def fused_on(self, device: Device) -> bool:
        """Return whether these kernels are fused on a device; `engine.kernels=auto` fuses them on a GPU only.

        Args:
            device: Kind of device.
        """
        kernels = self.config.engine.kernels
        return device == "cuda" if kernels == "auto" else kernels != "plain"

    @property
    def frees_gradients(self) -> bool:
        """Whether a gradient is freed as soon as it is added to the fp32 sum (DeepSpeed's bf16 optimizer, stage 1)."""
        held = not self.engine["bf16"].get("immediate_grad_update", False)
        return self.stage == 1 and self.element < self.accumulation_bytes and not held

    @property
    def zero(self) -> dict[str, Any]:
        """The "zero_optimization" group of the DeepSpeed dictionary."""
        return self.engine["zero_optimization"]

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.zero["stage"]

    @property
    def accumulation_bytes(self) -> int:
        """Bytes of an element of the gradient sum over micro-batches."""
        return ELEMENT_BYTES[self.engine["data_types"]["grad_accum_dtype"]]

    @property
    def communication_bytes(self) -> int:
        """Bytes of an element of the gradient sum over ranks."""
        return ELEMENT_BYTES[self.engine["communication_data_type"]]

    @property
    def tokens(self) -> int:
        """Input tokens of a micro-batch."""
        return self.batch.micro_size * self.batch.sequence_length

    @property
    def target_rows(self) -> int:
        """Rows of a micro-batch that reach the LM head."""
        return self.batch.target_rows

    @property
    def has_objective(self) -> bool:
        """Whether the LM head computes an objective's terms, by torch's operators, and not the cross-entropy alone."""
        objective = self.config.objective
        return objective.name != OBJECTIVES[0] or objective.z_loss > 0 or objective.token_weights is not None

    @property
    def variable_length(self) -> bool:
        """Whether attention is of variable length: windows of several masked texts, or a prefix LM."""
        finetune = self.config.finetune
        if self.config.task.name is None:
            return self.config.data.intra_document_masking
        return finetune.batching == "packed" or finetune.prefix_attention == "bidirectional"

    @property
    def has_positions(self) -> bool:
        """Whether each window has rotary positions of its own: several texts, or pauses that use up none."""
        return self.variable_length or self.config.pause.positions == "shared"

    @property
    def rows(self) -> int:
        """Rows of the vocabulary matrices on this rank."""
        return padded_vocabulary(self.model, self.vocabulary, self.tensor) // self.tensor

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """This rank's parameters."""
        return rank_parameters(self.model, self.vocabulary, self.tensor, lora_of(self.config))

    def sums_gradient(self, parameter: Parameter) -> bool:
        """Return whether tensor-parallel ranks sum the gradient of a parameter that each of them has (`model`'s hooks).

        Args:
            parameter: One of `parameters`.
        """
        partial = self.config.parallel.sequence or parameter.name.endswith(_OF_OWN_HEADS)
        return self.tensor > 1 and parameter.replicated and partial

    @cached_property
    def numel(self) -> int:
        """Elements of this rank's parameters."""
        return sum(p.numel for p in self.parameters)

    @cached_property
    def group_numels(self) -> tuple[int, int]:
        """Elements with and without weight decay; DeepSpeed flattens each group separately."""
        decaying = sum(p.numel for p in self.parameters if p.decays)
        return decaying, self.numel - decaying

    @cached_property
    def flat_numel(self) -> int:
        """Elements of the flat groups of stages 1 and 2, each padded to a multiple of 2 x data-parallel size."""
        return sum(padded(numel, 2 * self.data_parallel) for numel in self.group_numels)

    @cached_property
    def partitioned_numel(self) -> int:
        """Elements at stage 3 over all data-parallel ranks, each parameter padded to a multiple of their number."""
        return sum(padded(p.numel, self.data_parallel) for p in self.parameters)

    def offloaded(self, group: Literal["offload_optimizer", "offload_param"]) -> bool:
        """Return whether a state is offloaded to the host.

        Args:
            group: Key of "zero_optimization".
        """
        return self.zero.get(group, {}).get("device", "none") != "none"


def padded(numel: int, multiple: int) -> int:
    """Return a number of elements, rounded up to a multiple.

    Args:
        numel: The number.
        multiple: The multiple.
    """
    return -(-numel // multiple) * multiple
