"""Bytes of tensors on one rank, by kind, in the phases of a step that may be the peak."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.plan.activations import Activations, activations
from pause_megatron.plan.layout import Device, Layout
from pause_megatron.plan.live import live_parameters
from pause_megatron.plan.reductions import reductions
from pause_megatron.plan.states import TrainingStates, built_gradients, training_states


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank by phase and by kind.

    Attributes:
        phases: Bytes of each kind in each phase of a step.
        built_bytes: Bytes after start-up, before the first step.
        host_bytes: Bytes on the host, per rank.
    """

    phases: dict[str, dict[str, int]]
    built_bytes: int
    host_bytes: int

    @property
    def peak_phase(self) -> str:
        """The phase with most bytes."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """Bytes of all tensors in that phase."""
        return sum(self.phases[self.peak_phase].values())


def rank_memory(layout: Layout, device: Device = "cuda") -> RankMemory:
    """Return the memory of a rank.

    Args:
        layout: A run on its ranks.
        device: Kind of device, which decides what kernels keep (see `activations`).
    """
    states, kept = training_states(layout), activations(layout, device)
    token = 20 if layout.variable_length and device == "cpu" else 16  # sequence lengths stay on the host
    row = 38 if layout.has_objective else 17  # with rows, sizes, kinds and weights of runs
    batches = layout.batch.accumulation * (token * layout.tokens + row * layout.target_rows)
    always = {
        "weights": states.weights,
        "optimizer": states.optimizer,
        "gradients": states.gradients,
        "buffers": states.buffers + kept.run_buffers,
        "batches": batches,
    }
    phases = {"start-up": {"weights": _start_up(layout)}}
    phases |= {name: always | extra for name, extra in _phases(layout, states, kept).items()}
    built = sum(always.values()) - states.gradients - kept.run_buffers + built_gradients(layout, states)
    if layout.stage == 3:  # parameters that are never partitioned are gathered by the first step
        built -= layout.element * live_parameters(layout).persistent_numel
    return RankMemory(phases, built, states.host)


def _phases(layout: Layout, states: TrainingStates, kept: Activations) -> dict[str, dict[str, int]]:
    """Return the bytes of each kind in each phase, where they differ from those that always exist."""
    layers = layout.model.depth
    all_layers = kept.angles + layers * (kept.layer_input if layout.recompute else kept.layer)
    again = kept.layer + kept.layer_input if layout.recompute else 0  # with its output, recomputed
    buffers = states.buffers + kept.run_buffers
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
    if layout.model.loops > 1:
        phases["looped gradients"] = in_backward | _looped_gradients(layout, states, kept)
    if states.bucket:
        phases["gradient reduction"] = _costliest_reduction(layout, states, kept) | {
            "gradients": states.gradients + states.new_gradients
        }
    return phases


def _looped_gradients(layout: Layout, states: TrainingStates, kept: Activations) -> dict[str, int]:
    """Return the bytes when the last run of the looped layers has passed backwards, and earlier runs have not.

    torch sums the gradients of all runs of a parameter before any engine gets them, so that here those of all looped
    layers exist whole, at stages 2 and 3 too.
    """
    model = layout.model
    parameters = {p.name: p.numel for p in layout.parameters}
    looped = tuple(f"decoder.layers.{number}." for number in model.looped)
    before = tuple(f"decoder.layers.{number}." for number in range(model.looped.start))
    pending = sum(numel for name, numel in parameters.items() if name.startswith(looped))
    done = sum(numel for name, numel in parameters.items() if not name.startswith((*looped, *before, "embedding.")))
    exist = pending + (done if layout.stage < 2 and states.new_gradients else 0)
    layers = model.looped.start + (model.loops - 1) * len(model.looped)  # with the one whose backward pass begins
    again = kept.layer + kept.layer_input if layout.recompute else 0
    activations = kept.angles + layers * (kept.layer_input if layout.recompute else kept.layer) + again
    return {
        "gathered parameters": max(0, states.live - layout.element * done),  # freed after their last use
        "gradients": states.gradients + layout.element * exist,
        "activations": activations + kept.layer_workspace,
        "head": kept.head_gradient,
    }


def _costliest_reduction(layout: Layout, states: TrainingStates, kept: Activations) -> dict[str, int]:
    """Return the bytes at the reduction of a backward pass at which most tensors exist."""
    candidates = []
    buffers = states.buffers + kept.run_buffers + states.backward_buffers
    share = layout.numel // layout.data_parallel
    for reduction in reductions(layout, kept, states.bucket):
        temporaries = reduction.numel * states.reduction
        if reduction.oversized:
            # It is reduced in place, piece by piece.
            pieces = min(reduction.numel, share) if layout.stage == 2 else reduction.numel
            temporaries = layout.element * reduction.numel + layout.communication_bytes * pieces
        candidates.append(
            {
                # A parameter is freed after its last use.
                "gathered parameters": max(0, states.live - layout.element * reduction.done),
                "activations": reduction.activation_bytes + kept.layer_input,
                "buffers": buffers + temporaries,
            }
        )
    return max(candidates, key=lambda candidate: sum(candidate.values()))


def _start_up(layout: Layout) -> int:
    """Return the bytes at start-up: the whole model, and a flat copy of a group at stages 1 and 2."""
    copied = max(layout.group_numels) if layout.stage in (1, 2) else 0
    return layout.element * (layout.numel + copied)
