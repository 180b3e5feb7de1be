"""Seconds of a step: computing, and communication that nothing hides. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.presets import layer_parameters, step_flops
from pause_megatron.plan.communication import Traffic
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.machine import Assumptions, Cluster
from pause_megatron.plan.roofline import Computing, computing


@dataclass(frozen=True)
class Wire:
    """Traffic on the links of a cluster.

    Attributes:
        traffic: what is sent
        crosses_nodes: whether its group spans nodes
        inter_node_bytes: of what one rank sends, the share that leaves its node (on average over the ring)
        seconds: of one step, at the slowest link of the ring
        exposed_seconds: of these, what computing does not hide
    """

    traffic: Traffic
    crosses_nodes: bool
    inter_node_bytes: float
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        model_flops: of the rows that are computed (`config.presets.step_flops`), over all ranks
        executed_flops: with layers that run again
        compute_seconds: of the kernels (`parts`), or of the executed FLOPs at an MFU that was given or measured
        parts: computing by kinds of kernels; None: an MFU was given or measured
        exposed_seconds: communication that nothing hides
        offload_seconds: transfers to the host and the optimizer step there
    """

    model_flops: int
    executed_flops: int
    compute_seconds: float
    parts: Computing | None
    exposed_seconds: float
    offload_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute_seconds + self.exposed_seconds + self.offload_seconds


def step_time(
    layout: Layout, traffic: tuple[Traffic, ...], cluster: Cluster, assumptions: Assumptions
) -> tuple[StepTime, tuple[Wire, ...]]:
    """Estimates a step.

    Args:
        layout: the run
        traffic: its collectives (`step_traffic`)
        cluster: where it runs; consecutive ranks of a node are tensor parallel
        assumptions: efficiencies of kernels and links, overlap
    """
    batch, parts = layout.batch, None
    model_flops = step_flops(
        layout.model,
        layout.vocabulary,
        batch.sequence_length,
        tokens=batch.raw_tokens,
        targets=batch.targets,
    )
    executed = model_flops + (_forward_flops(layout) * batch.raw_tokens if layout.recompute else 0)
    if assumptions.mfu is None:
        parts = computing(layout, cluster.gpu, assumptions)
        compute = parts.seconds
    else:  # one that was measured counts no recomputation
        flops = executed if assumptions.mfu.ranks is None else model_flops
        compute = flops / (cluster.ranks * cluster.gpu.peak_flops * assumptions.mfu.value)
    seconds = [_seconds(t, layout, cluster, assumptions) for t in traffic]
    hideable = sum(s for t, s in zip(traffic, seconds, strict=True) if _hides(t, layout))
    hidden = min(assumptions.overlap.value, compute / hideable) if hideable else 0.0
    wires = tuple(
        _wire(t, s, hidden if _hides(t, layout) else 0.0, layout, cluster)
        for t, s in zip(traffic, seconds, strict=True)
    )
    # Measured on as many ranks, the traffic is in the MFU already.
    counted = assumptions.mfu is not None and assumptions.mfu.ranks == cluster.ranks
    exposed = 0.0 if counted else sum(wire.exposed_seconds for wire in wires)
    return StepTime(model_flops, executed, compute, parts, exposed, _offload(layout, cluster, assumptions)), wires


def _forward_flops(layout: Layout) -> int:
    """A layer's forward pass is a third of its 6 N + 12 d T."""
    model = layout.model
    return model.layers * (2 * layer_parameters(model) + 4 * model.hidden * layout.batch.sequence_length)


def _seconds(traffic: Traffic, layout: Layout, cluster: Cluster, assumptions: Assumptions) -> float:
    members, gpu = _members_on_a_node(traffic, layout, cluster), cluster.gpu
    bandwidth = float("inf")
    if members > 1:
        bandwidth = gpu.link_bytes if members <= gpu.link_ranks else gpu.host_link_bytes
    if members < traffic.ranks:
        # Every member on a node has an adapter, and NCCL runs a ring through each.
        bandwidth = min(bandwidth, gpu.network_bytes * members)
    return traffic.wire_bytes / (bandwidth * assumptions.link_efficiency.value)


def _hides(traffic: Traffic, layout: Layout) -> bool:
    """Stages 2 and 3 can reduce while the backward pass goes on; stage 3 gathers ahead. Nothing else overlaps."""
    overlaps = layout.zero.get("overlap_comm") and traffic.group == "data"
    return bool(overlaps) and (layout.stage == 3 or (layout.stage == 2 and traffic.purpose == "gradients"))


def _wire(traffic: Traffic, seconds: float, hidden: float, layout: Layout, cluster: Cluster) -> Wire:
    members = _members_on_a_node(traffic, layout, cluster)
    crosses = members < traffic.ranks
    leaving = traffic.wire_bytes / members if crosses else 0.0
    return Wire(traffic, crosses, leaving, seconds, seconds * (1 - hidden))


def _members_on_a_node(traffic: Traffic, layout: Layout, cluster: Cluster) -> int:
    if traffic.group == "tensor":
        return min(traffic.ranks, cluster.gpus_per_node)
    return max(1, min(traffic.ranks, cluster.gpus_per_node // layout.tensor))


def _offload(layout: Layout, cluster: Cluster, assumptions: Assumptions) -> float:
    share = layout.numel / layout.data_parallel
    seconds = 0.0
    if layout.offloaded("offload_optimizer"):
        transfers = (layout.accumulation_bytes + layout.element) * share / cluster.gpu.host_link_bytes
        # AdamW reads gradient, master and moments and writes the latter three: 28 bytes an element.
        seconds += transfers + 28 * share * cluster.gpus_per_node / assumptions.host_adam_bytes.value
    if layout.offloaded("offload_param"):
        passes = 2 * layout.batch.accumulation
        seconds += passes * layout.element * share / cluster.gpu.host_link_bytes
    return seconds
