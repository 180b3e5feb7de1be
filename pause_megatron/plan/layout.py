"""The sizes that memory, communication and time are worked out from: one run on one rank. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pause_megatron.config.batching import BatchPlan, batch_plan
from pause_megatron.config.deepspeed import deepspeed_config
from pause_megatron.config.schema import ResolvedConfig, ResolvedModel
from pause_megatron.plan.shapes import Parameter, padded_vocabulary, rank_parameters

FALLBACK_BUCKET = 500_000_000  # elements that DeepSpeed sums at a time where no reduce_bucket_size applies
Device = Literal["cuda", "cpu"]
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """A configuration on a number of ranks.

    Attributes:
        config: resolved
        batch: its batches on these ranks
        engine: its complete DeepSpeed dictionary
        vocabulary: live rows, text and pauses
    """

    config: ResolvedConfig
    batch: BatchPlan
    engine: dict[str, Any]
    vocabulary: int

    @classmethod
    def of(cls, config: ResolvedConfig, world_size: int, text_size: int) -> Layout:
        """Lays a run out.

        Raises:
            ConfigError: the ranks or the batch do not divide, or the DeepSpeed file cannot be used.
        """
        batch = batch_plan(config, world_size)
        engine = deepspeed_config(config, data_parallel=batch.data_parallel)
        return cls(config, batch, engine, text_size + config.pause.embeddings)

    @property
    def model(self) -> ResolvedModel:
        return self.config.model

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return self.batch.tensor

    @property
    def data_parallel(self) -> int:
        """Ranks that see different windows."""
        return self.batch.data_parallel

    @property
    def sequence_split(self) -> int:
        """Parts into which norms and residuals are cut along the sequence."""
        return self.tensor if self.config.parallel.sequence else 1

    @property
    def recompute(self) -> bool:
        """Whether layers run again in the backward pass."""
        return self.config.parallel.recompute == "full"

    @property
    def element(self) -> int:
        """Bytes of an element of weights and activations."""
        return ELEMENT_BYTES[self.config.engine.precision]

    @property
    def fused(self) -> bool:
        """Whether rotary embedding, SwiGLU and cross-entropy are a kernel each on a GPU."""
        return self.fused_on("cuda")

    def fused_on(self, device: Device) -> bool:
        """Whether they are on a device: `engine.kernels` means the fused ones on a GPU only, if it is auto."""
        kernels = self.config.engine.kernels
        return device == "cuda" if kernels == "auto" else kernels != "plain"

    @property
    def adds_at_once(self) -> bool:
        """Whether a gradient is let go of as soon as it is in the fp32 sum (DeepSpeed's bf16 optimizer, stage 1)."""
        held = not self.engine["bf16"].get("immediate_grad_update", False)
        return self.stage == 1 and self.element < self.accumulation_bytes and not held

    @property
    def zero(self) -> dict[str, Any]:
        """The "zero_optimization" group."""
        return self.engine["zero_optimization"]

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.zero["stage"]

    @property
    def accumulation_bytes(self) -> int:
        """Bytes of an element in which gradients are summed over micro-batches."""
        return ELEMENT_BYTES[self.engine["data_types"]["grad_accum_dtype"]]

    @property
    def communication_bytes(self) -> int:
        """Bytes of an element in which gradients are summed over ranks."""
        return ELEMENT_BYTES[self.engine["communication_data_type"]]

    @property
    def tokens(self) -> int:
        """Input tokens of a micro-batch."""
        return self.batch.micro_size * self.batch.sequence_length

    @property
    def target_rows(self) -> int:
        """Rows of a micro-batch that reach the head."""
        return self.batch.target_rows

    @property
    def variable_length(self) -> bool:
        """Whether attention goes by spans: windows of texts that do not see each other, or a prefix-LM."""
        finetune = self.config.finetune
        if self.config.task.name is None:
            return self.config.data.intra_document_masking
        return finetune.batching == "packed" or finetune.prefix_attention == "bidirectional"

    @property
    def rows(self) -> int:
        """Rows of the vocabulary matrices on this rank."""
        return padded_vocabulary(self.model, self.vocabulary, self.tensor) // self.tensor

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """This rank's parameters."""
        return rank_parameters(self.model, self.vocabulary, self.tensor)

    @cached_property
    def numel(self) -> int:
        """Elements of this rank's parameters."""
        return sum(p.numel for p in self.parameters)

    @cached_property
    def group_numels(self) -> tuple[int, int]:
        """Elements with and without weight decay: DeepSpeed flattens each group for itself."""
        decaying = sum(p.numel for p in self.parameters if p.decays)
        return decaying, self.numel - decaying

    @cached_property
    def flat_numel(self) -> int:
        """Elements of the flat groups of stages 1 and 2: each upwards to a multiple of 2 x data-parallel ranks."""
        return sum(padded(numel, 2 * self.data_parallel) for numel in self.group_numels)

    @cached_property
    def partitioned_numel(self) -> int:
        """Elements at stage 3 over all data-parallel ranks: each parameter upwards to a multiple of them."""
        return sum(padded(p.numel, self.data_parallel) for p in self.parameters)

    def offloaded(self, what: str) -> bool:
        """Whether "offload_optimizer" or "offload_param" moves its state to the host."""
        return self.zero.get(what, {}).get("device", "none") != "none"


def padded(numel: int, multiple: int) -> int:
    """Upwards to a multiple."""
    return -(-numel // multiple) * multiple
