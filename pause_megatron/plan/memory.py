"""Bytes of tensors on one rank, by what they are, at the moments when they are most. No torch.

ZeRO's formulas (Rajbhandari et al. 2020, section 3) with what DeepSpeed 0.19 really keeps: fp32 sums of gradients over
micro-batches, flat copies while it reduces, buckets, gathered parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pause_megatron.plan.activations import Activations, activations
from pause_megatron.plan.layout import FALLBACK_BUCKET, Device, Layout, padded
from pause_megatron.plan.live import live_parameters
from pause_megatron.plan.reductions import reductions


@dataclass(frozen=True)
class States:
    """Bytes that training states take on a rank, and what reducing and stepping add.

    Attributes:
        weights: parameters, gathered ones of stage 3 not included
        live: gathered parameters of stage 3, at most
        optimizer: fp32 master weights and two moments
        gradients: held from one micro-batch to the next
        new_gradients: held at the end of a backward pass on top of `gradients`
        buffers: that live for good
        backward_buffers: from the first gradient of a backward pass to its end
        end_reduction: temporaries of a reduction at the end of the step; 0 where the backward pass reduces
        reduction: temporaries of one in the backward pass, per element
        bucket: elements of a reduction in the backward pass
        step: temporaries of the optimizer step
        host: on the host instead (offload)
    """

    weights: int
    live: int
    optimizer: int
    gradients: int
    new_gradients: int
    buffers: int
    backward_buffers: int
    end_reduction: int = 0
    reduction: int = 0
    bucket: int = 0
    step: int = 0
    host: int = 0


@dataclass(frozen=True)
class RankMemory:
    """Bytes by phase and by kind.

    Attributes:
        phases: moment of a step -> kind -> bytes
        built_bytes: after start-up, before the first step
        host_bytes: on the host, per rank
    """

    phases: dict[str, dict[str, int]]
    built_bytes: int
    host_bytes: int

    @property
    def peak_phase(self) -> str:
        """The moment with most bytes."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """Bytes of all tensors at that moment."""
        return sum(self.phases[self.peak_phase].values())


def rank_memory(layout: Layout, device: Device = "cuda") -> RankMemory:
    """Works out the memory of a rank.

    Args:
        layout: the run
        device: whose kernels keep what (`activations`)
    """
    states, kept = _states(layout), activations(layout, device)
    token = 20 if layout.by_spans and device == "cpu" else 16  # numbers of texts stay on the host
    batches = layout.batch.accumulation * (token * layout.tokens + 17 * layout.target_rows)
    always = {
        "weights": states.weights,
        "optimizer": states.optimizer,
        "gradients": states.gradients,
        "buffers": states.buffers + kept.gather_buffer,
        "batches": batches,
    }
    phases = {"start-up": {"weights": _start_up(layout)}}
    phases |= {name: always | extra for name, extra in _phases(layout, states, kept).items()}
    built = sum(always.values()) - states.gradients - kept.gather_buffer + _built_gradients(layout, states)
    return RankMemory(phases, built, states.host)


def _phases(layout: Layout, states: States, kept: Activations) -> dict[str, dict[str, int]]:
    layers = layout.model.layers
    all_layers = kept.angles + layers * (kept.layer_input if layout.recompute else kept.layer)
    again = kept.layer + kept.layer_input if layout.recompute else 0  # with its output, made once more
    buffers = states.buffers + kept.gather_buffer
    in_backward = {"gathered parameters": states.live, "buffers": buffers + states.backward_buffers}
    # DeepSpeed's stage 1 in fp32 keeps its bucket from the first backward pass of a step to the last.
    kept_buffers = states.backward_buffers if layout.stage == 1 and layout.batch.accumulation > 1 else 0
    phases = {
        "head": {
            "gathered parameters": states.live,
            "buffers": buffers + kept_buffers,
            "activations": all_layers + kept.final_norm + kept.head_rows,
            "head": kept.head_chunk,
        },
        "last norm backward": in_backward
        | {"activations": all_layers + kept.final_norm + kept.norm_workspace, "head": kept.head_gradient},
        "last layer backward": in_backward
        | {"activations": all_layers + again + kept.layer_workspace, "head": kept.head_gradient},
        "gradients complete": in_backward
        | {
            "gradients": states.gradients + states.new_gradients,
            "buffers": buffers + states.backward_buffers + states.end_reduction,
        },
        "optimizer step": {"gradients": states.gradients + states.new_gradients, "buffers": buffers + states.step},
    }
    if states.bucket:
        phases["gradient reduction"] = _costliest_reduction(layout, states, kept) | {
            "gradients": states.gradients + states.new_gradients
        }
    return phases


def _costliest_reduction(layout: Layout, states: States, kept: Activations) -> dict[str, int]:
    """The reduction in the backward pass at which most exists."""
    candidates = []
    buffers = states.buffers + kept.gather_buffer + states.backward_buffers
    share = layout.numel // layout.data_parallel
    for reduction in reductions(layout, kept, states.bucket):
        temporaries = reduction.numel * states.reduction
        if reduction.oversized:
            # It is summed piece by piece, where it lies.
            pieces = min(reduction.numel, share) if layout.stage == 2 else reduction.numel
            temporaries = layout.element * reduction.numel + layout.communication_bytes * pieces
        candidates.append(
            {
                # What has been used for the last time is freed.
                "gathered parameters": max(0, states.live - layout.element * reduction.done),
                "activations": reduction.activation_bytes + kept.layer_input,
                "buffers": buffers + temporaries,
            }
        )
    return max(candidates, key=lambda candidate: sum(candidate.values()))


def _start_up(layout: Layout) -> int:
    """DeepSpeed moves the whole model to the GPU before it splits it (3), and copies a group to flatten it (1, 2)."""
    copied = max(layout.group_numels) if layout.stage in (1, 2) else 0
    return layout.element * (layout.numel + copied)


def _built_gradients(layout: Layout, states: States) -> int:
    """Gradients that exist before the first step."""
    if layout.stage == 1 and layout.element < layout.accumulation_bytes:
        return layout.accumulation_bytes * layout.flat_numel
    return states.gradients if layout.stage == 3 else 0


def _states(layout: Layout) -> States:
    stage = layout.stage
    if stage == 1 and layout.element == layout.accumulation_bytes:
        return _flat_stage1(layout)
    by_stage: dict[int, Callable[[Layout], States]] = {0: _stage0, 1: _bf16_stage1, 2: _stage2, 3: _stage3}
    return by_stage[stage](layout)


def _stage0(layout: Layout) -> States:
    """bf16: fp32 clones of everything; gradients are copied to fp32 to be summed, and again to be applied."""
    numel, element = layout.numel, layout.element
    half = element < 4
    bucket = min(numel, FALLBACK_BUCKET)
    held = element * numel if layout.batch.accumulation > 1 else 0
    return States(
        weights=element * numel,
        live=0,
        optimizer=(12 if half else 8) * numel,
        gradients=held,
        new_gradients=element * numel - held,
        buffers=0,
        backward_buffers=0,
        end_reduction=(element + (layout.communication_bytes if half else 0)) * bucket,
        step=4 * numel if half else 0,
    )


def _bf16_stage1(layout: Layout) -> States:
    """DeepSpeed's bf16 optimizer: the whole gradient in fp32 on every rank for good, and the bf16 one within a step.

    With `immediate_grad_update` it lets go of a bf16 gradient as soon as it is added.
    """
    flat = layout.flat_numel
    decaying = padded(layout.group_numels[0], 2 * layout.data_parallel)
    together = flat if decaying <= FALLBACK_BUCKET else 0  # a group alone in its bucket is summed where it lies
    half = 0 if layout.adds_at_once else layout.element * layout.numel
    held = half if layout.batch.accumulation > 1 else 0
    return States(
        weights=layout.element * flat,
        live=0,
        optimizer=12 * flat // layout.data_parallel,
        gradients=layout.accumulation_bytes * flat + held,
        new_gradients=half - held,
        buffers=0,
        backward_buffers=0,
        end_reduction=layout.communication_bytes * together,
    )


def _flat_stage1(layout: Layout) -> States:
    flat, element = layout.flat_numel, layout.element
    bucket = layout.zero["reduce_bucket_size"]
    held = element * layout.numel if layout.batch.accumulation > 1 else 0
    return States(
        weights=element * flat,
        live=0,
        optimizer=12 * flat // layout.data_parallel,
        gradients=held,
        new_gradients=element * layout.numel - held,
        buffers=0,
        backward_buffers=4 * bucket,
        end_reduction=4 * min(bucket, layout.numel) + 4 * flat // layout.data_parallel,
        step=8 * flat // layout.data_parallel,
    )


def _stage2(layout: Layout) -> States:
    flat, bucket = layout.flat_numel, layout.zero["reduce_bucket_size"]
    share = layout.accumulation_bytes * flat // layout.data_parallel
    held = share if layout.batch.accumulation > 1 else 0
    copies = 2 if layout.zero.get("overlap_comm") else 1
    to_host = layout.offloaded("offload_optimizer")
    optimizer = 12 * flat // layout.data_parallel
    return States(
        weights=layout.element * flat,
        live=0,
        optimizer=0 if to_host else optimizer,
        gradients=held,
        new_gradients=share - held,
        buffers=0,
        backward_buffers=copies * layout.element * bucket,
        # Slices are put together, then turned into the type in which they are summed.
        reduction=layout.element + (layout.communication_bytes if layout.element < 4 else 0),
        bucket=bucket,
        step=share if layout.element == 4 else 0,
        host=optimizer + 4 * flat // layout.data_parallel if to_host else 0,
    )


def _stage3(layout: Layout) -> States:
    live, ranks = live_parameters(layout), layout.data_parallel
    share = layout.partitioned_numel // ranks
    bucket = layout.zero["reduce_bucket_size"]
    to_host, weights_to_host = layout.offloaded("offload_optimizer"), layout.offloaded("offload_param")
    weights = layout.element * share
    gradients = layout.accumulation_bytes * share
    return States(
        weights=layout.element * live.persistent_numel + (0 if weights_to_host else weights),
        live=layout.element * live.peak_numel,
        optimizer=0 if to_host else 12 * share,
        gradients=0 if to_host else gradients,
        new_gradients=0,
        buffers=layout.communication_bytes * bucket,
        backward_buffers=0,
        reduction=layout.communication_bytes,
        bucket=bucket,
        # Masters, moments, gradients that the step takes; the sums over micro-batches.
        host=(16 * share + gradients if to_host else 0) + (weights if weights_to_host else 0),
    )
