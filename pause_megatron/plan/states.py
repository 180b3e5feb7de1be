"""Bytes of weights, gradients, optimizer state and communication buffers on one rank, for each ZeRO stage.

ZeRO's formulas (Rajbhandari et al. 2020, section 3), with what DeepSpeed 0.19 keeps in addition: fp32 sums of gradients
over micro-batches, flat copies during a reduction, buckets, and the parameters that stage 3 gathers.
"""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.plan.layout import FALLBACK_BUCKET, Layout, padded
from pause_megatron.plan.live import live_parameters


@dataclass(frozen=True)
class TrainingStates:
    """Bytes of the training states of a rank, and of the temporaries of reduction and optimizer step.

    Attributes:
        weights: Parameters, without those that stage 3 gathers.
        live: Maximum of the parameters that stage 3 gathers.
        optimizer: fp32 master weights and two moments.
        gradients: Gradients held from one micro-batch to the next.
        new_gradients: Gradients held at the end of a backward pass in addition to `gradients`.
        buffers: Buffers allocated for the whole run.
        backward_buffers: Buffers from the first gradient of a backward pass to its end.
        end_reduction: Temporaries of a reduction at the end of the step; 0 where the backward pass reduces.
        reduction: Temporaries of a reduction in the backward pass, bytes per element.
        bucket: Elements of a reduction in the backward pass; 0 where the end of the step reduces.
        step: Temporaries of the optimizer step.
        host: Bytes offloaded to the host.
    """

    weights: int
    optimizer: int
    gradients: int
    new_gradients: int
    live: int = 0
    buffers: int = 0
    backward_buffers: int = 0
    end_reduction: int = 0
    reduction: int = 0
    bucket: int = 0
    step: int = 0
    host: int = 0


def training_states(layout: Layout) -> TrainingStates:
    """Return the training states of a rank.

    Args:
        layout: A run on its ranks.
    """
    if layout.stage == 0:
        return _stage0(layout)
    if layout.stage == 2:
        return _stage2(layout)
    if layout.stage == 3:
        return _stage3(layout)
    return _stage1(layout) if layout.element == layout.accumulation_bytes else _bf16_stage1(layout)


def built_gradients(layout: Layout, states: TrainingStates) -> int:
    """Return the bytes of gradients that exist before the first step.

    Args:
        layout: A run on its ranks.
        states: Its training states.
    """
    if layout.stage == 1 and layout.element < layout.accumulation_bytes:
        return layout.accumulation_bytes * layout.flat_numel
    return states.gradients if layout.stage == 3 else 0


def _stage0(layout: Layout) -> TrainingStates:
    """Return states of stage 0; in bf16 an fp32 copy of all, and gradients copied to fp32 to be summed and applied."""
    numel, element = layout.numel, layout.element
    half = element < 4
    bucket = min(numel, FALLBACK_BUCKET)
    held = element * numel if layout.batch.accumulation > 1 else 0
    return TrainingStates(
        weights=element * numel,
        optimizer=(12 if half else 8) * numel,
        gradients=held,
        new_gradients=element * numel - held,
        end_reduction=(element + (layout.communication_bytes if half else 0)) * bucket,
        step=4 * numel if half else 0,
    )


def _bf16_stage1(layout: Layout) -> TrainingStates:
    """Return states of DeepSpeed's bf16 optimizer: each rank keeps the whole gradient in fp32.

    The bf16 gradient exists within a step; with `immediate_grad_update` it is freed as soon as it is added.
    """
    flat = layout.flat_numel
    decaying = padded(layout.group_numels[0], 2 * layout.data_parallel)
    together = flat if decaying <= FALLBACK_BUCKET else 0  # a group alone in its bucket is reduced in place
    half = 0 if layout.frees_gradients else layout.element * layout.numel
    held = half if layout.batch.accumulation > 1 else 0
    return TrainingStates(
        weights=layout.element * flat,
        optimizer=12 * flat // layout.data_parallel,
        gradients=layout.accumulation_bytes * flat + held,
        new_gradients=half - held,
        end_reduction=layout.communication_bytes * together,
    )


def _stage1(layout: Layout) -> TrainingStates:
    """Return states of stage 1 with gradients in the precision of the model: flat groups, one bucket."""
    flat, element = layout.flat_numel, layout.element
    bucket = layout.zero["reduce_bucket_size"]
    held = element * layout.numel if layout.batch.accumulation > 1 else 0
    return TrainingStates(
        weights=element * flat,
        optimizer=12 * flat // layout.data_parallel,
        gradients=held,
        new_gradients=element * layout.numel - held,
        backward_buffers=4 * bucket,
        end_reduction=4 * min(bucket, layout.numel) + 4 * flat // layout.data_parallel,
        step=8 * flat // layout.data_parallel,
    )


def _stage2(layout: Layout) -> TrainingStates:
    """Return states of stage 2: each rank keeps its share of the gradients, reduced bucket by bucket."""
    flat, bucket = layout.flat_numel, layout.zero["reduce_bucket_size"]
    share = layout.accumulation_bytes * flat // layout.data_parallel
    held = share if layout.batch.accumulation > 1 else 0
    copies = 2 if layout.zero.get("overlap_comm") else 1
    to_host = layout.offloaded("offload_optimizer")
    optimizer = 12 * flat // layout.data_parallel
    return TrainingStates(
        weights=layout.element * flat,
        optimizer=0 if to_host else optimizer,
        gradients=held,
        new_gradients=share - held,
        backward_buffers=copies * layout.element * bucket,
        # Slices are concatenated, then converted to the type in which they are reduced.
        reduction=layout.element + (layout.communication_bytes if layout.element < 4 else 0),
        bucket=bucket,
        step=share if layout.element == 4 else 0,
        host=optimizer + 4 * flat // layout.data_parallel if to_host else 0,
    )


def _stage3(layout: Layout) -> TrainingStates:
    """Return states of stage 3: each rank keeps its share of parameters, gradients and optimizer state."""
    live, ranks = live_parameters(layout), layout.data_parallel
    share = layout.partitioned_numel // ranks
    bucket = layout.zero["reduce_bucket_size"]
    to_host, weights_to_host = layout.offloaded("offload_optimizer"), layout.offloaded("offload_param")
    weights = layout.element * share
    gradients = layout.accumulation_bytes * share
    return TrainingStates(
        weights=layout.element * live.persistent_numel + (0 if weights_to_host else weights),
        live=layout.element * live.peak_numel,
        optimizer=0 if to_host else 12 * share,
        gradients=0 if to_host else gradients,
        new_gradients=0,
        buffers=layout.communication_bytes * bucket,
        reduction=layout.communication_bytes,
        bucket=bucket,
        # Master weights, moments, gradients of the step; sums over micro-batches.
        host=(16 * share + gradients if to_host else 0) + (weights if weights_to_host else 0),
    )
