"""Exact bytes of the collectives of one optimizer step, by purpose.

Counted are parameters, gradients, activations and token losses. Not counted are a few scalars a step (gradient norms,
overflow flags, token counts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pause_megatron.config.objective_rules import CYB
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.live import live_parameters
from pause_megatron.plan.shapes import gathers_qkv, qkv_width

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce"]
Group = Literal["data", "tensor"]

_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one optimizer step.

    Attributes:
        purpose: Tensors that are communicated.
        operation: Kind of collective.
        group: Data-parallel or tensor-parallel group.
        ranks: Size of that group.
        bytes: Bytes of the whole tensors (input of an all-reduce or reduce-scatter, output of an all-gather).
    """

    purpose: str
    operation: Operation
    group: Group
    ranks: int
    bytes: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that one rank sends in a ring: 2 (n-1)/n of them for an all-reduce, (n-1)/n for the others."""
        return _ROUNDS[self.operation] * (self.ranks - 1) / self.ranks * self.bytes


def step_traffic(layout: Layout) -> tuple[Traffic, ...]:
    """Return the collectives of an optimizer step, without groups of one rank.

    Args:
        layout: A run on its ranks.
    """
    collectives = [*_data_parallel(layout), *_tensor_parallel(layout)]
    return tuple(each for each in collectives if each.ranks > 1 and each.bytes > 0)


def _data_parallel(layout: Layout) -> list[Traffic]:
    ranks, stage, accumulation = layout.data_parallel, layout.stage, layout.batch.accumulation

    def traffic(purpose: str, operation: Operation, size: int) -> Traffic:
        return Traffic(purpose, operation, "data", ranks, size)

    if stage == 3:
        live = live_parameters(layout)
        gradients = layout.communication_bytes * layout.partitioned_numel * accumulation
        gathered = layout.element * (live.gathered_numel * accumulation + live.persistent_numel)
        return [traffic("gradients", "reduce_scatter", gradients), traffic("parameters", "all_gather", gathered)]
    if stage == 2:
        gradients = layout.communication_bytes * layout.numel * accumulation
        operation: Operation = "all_reduce" if _reduces_whole(layout) else "reduce"
        collectives = [traffic("gradients", operation, gradients)]
    elif stage == 1 and layout.element != layout.accumulation_bytes:
        # DeepSpeed's bf16 optimizer reduces its flat fp32 groups, padding included.
        collectives = [traffic("gradients", "all_reduce", layout.communication_bytes * layout.flat_numel)]
    else:
        collectives = [traffic("gradients", "all_reduce", layout.communication_bytes * layout.numel)]
    if stage > 0:
        collectives.append(traffic("parameters", "all_gather", layout.element * layout.flat_numel))
    return collectives


def _reduces_whole(layout: Layout) -> bool:
    return layout.zero.get("use_multi_rank_bucket_allreduce", True) or not layout.zero.get("reduce_scatter", True)


def _tensor_parallel(layout: Layout) -> list[Traffic]:
    """Return the collectives of tensor (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022)."""
    ranks, layers, passes = layout.tensor, layout.model.depth, layout.batch.accumulation
    hidden = layout.element * layout.model.hidden
    whole, targets = layout.tokens * hidden, layout.target_rows * hidden
    forwards = 2 if layout.recompute else 1

    def traffic(purpose: str, operation: Operation, size: int) -> Traffic:
        return Traffic(purpose, operation, "tensor", ranks, size * passes)

    numbers = 3  # maximum, target's logit, denominator
    if layout.config.objective.name in CYB:  # the request's logit; a softmax with pauses beside that without
        numbers += 1 + (2 if layout.config.objective.z_loss else 0)
    losses = traffic("token losses", "all_reduce", numbers * 4 * layout.target_rows)
    # Each rank has a part of the gradient: of the sequence, or of the heads. Summed over loops first.
    summed = layout.element * sum(p.numel for p in layout.parameters if layout.sums_gradient(p))
    attention = [traffic("norm gradients", "all_reduce", summed)]
    if gathers_qkv(layout.model, ranks):
        qkv = layout.element * layout.tokens * ranks * qkv_width(layout.model, ranks)
        attention += [
            traffic("queries, keys and values", "all_gather", layers * forwards * qkv),
            traffic("queries, keys and values", "reduce_scatter", layers * qkv),
        ]
    if layout.model.qk_norm == "whole":  # sums of squares of queries and keys, one fp32 number a token
        squares = 2 * 4 * layers * layout.tokens
        attention.append(traffic("query and key norms", "all_reduce", (forwards + 1) * squares))
    if not layout.config.parallel.sequence:
        return [
            *attention,
            traffic("layer activations", "all_reduce", 2 * layers * forwards * whole),
            traffic("layer gradients", "all_reduce", 2 * layers * whole),
            traffic("embedding", "all_reduce", whole),
            traffic("head gradients", "all_reduce", targets),
            losses,
        ]
    return [
        *attention,
        traffic("layer activations", "all_gather", 2 * layers * forwards * whole),
        traffic("layer activations", "reduce_scatter", 2 * layers * forwards * whole),
        # The inputs of both column-parallel layers are gathered again for their weight gradients.
        traffic("layer gradients", "all_gather", 4 * layers * whole),
        traffic("layer gradients", "reduce_scatter", 2 * layers * whole),
        traffic("embedding", "reduce_scatter", whole),
        traffic("embedding gradients", "all_gather", whole),
        traffic("head activations", "all_gather", whole),
        traffic("head gradients", "reduce_scatter", whole),
        losses,
    ]
