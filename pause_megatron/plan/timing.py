"""Seconds of a step: computing, and communication that does not overlap with it."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.presets import attended_tokens, layer_parameters, step_flops
from pause_megatron.plan.communication import Traffic
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.machine import Assumptions, Cluster
from pause_megatron.plan.roofline import Computing, computing


@dataclass(frozen=True)
class Wire:
    """Traffic on the links of a cluster.

    Attributes:
        traffic: Collectives of one kind.
        crosses_nodes: Whether their group spans nodes.
        inter_node_bytes: Bytes of a rank that leave its node, averaged over the ring.
        seconds: Seconds of a step, at the slowest link of the ring.
        exposed_seconds: Seconds that do not overlap with computing.
    """

    traffic: Traffic
    crosses_nodes: bool
    inter_node_bytes: float
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True)
class StepTime:
    """Time of one optimizer step.

    Attributes:
        model_flops: FLOPs of the rows that are computed (`config.presets.step_flops`), over all ranks.
        executed_flops: FLOPs with recomputation.
        compute_seconds: Seconds of the kernels (`parts`), or of the executed FLOPs at a given or measured MFU.
        parts: Computing by kind of kernel; None where an MFU was given or measured.
        exposed_seconds: Communication that does not overlap with computing.
        offload_seconds: Transfers to the host and the optimizer step there.
    """

    model_flops: int
    executed_flops: int
    compute_seconds: float
    parts: Computing | None
    exposed_seconds: float
    offload_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.compute_seconds + self.exposed_seconds + self.offload_seconds


def step_time(
    layout: Layout, traffic: tuple[Traffic, ...], cluster: Cluster, assumptions: Assumptions
) -> tuple[StepTime, tuple[Wire, ...]]:
    """Estimate the time of a step.

    Args:
        layout: A run on its ranks.
        traffic: Its collectives (`step_traffic`).
        cluster: Nodes and GPUs; consecutive ranks of a node are tensor parallel.
        assumptions: Efficiencies of kernels and links, overlap.

    Returns:
        The time, and the communication it contains.
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
    else:  # a measured MFU counts model FLOPs only
        flops = executed if assumptions.mfu.ranks is None else model_flops
        compute = flops / (cluster.ranks * cluster.gpu.peak_flops * assumptions.mfu.value)
    seconds = [_seconds(t, layout, cluster, assumptions) for t in traffic]
    hideable = sum(s for t, s in zip(traffic, seconds, strict=True) if _hides(t, layout))
    hidden = min(assumptions.overlap.value, compute / hideable) if hideable else 0.0
    wires = tuple(
        _wire(t, s, hidden if _hides(t, layout) else 0.0, layout, cluster)
        for t, s in zip(traffic, seconds, strict=True)
    )
    # An MFU that was measured on as many ranks includes the communication.
    counted = assumptions.mfu is not None and assumptions.mfu.ranks == cluster.ranks
    exposed = 0.0 if counted else sum(wire.exposed_seconds for wire in wires)
    return StepTime(model_flops, executed, compute, parts, exposed, _offload(layout, cluster, assumptions)), wires


def _forward_flops(layout: Layout) -> int:
    """Return the FLOPs per token of a forward pass, a third of 6 N + 12 d T of each layer."""
    model = layout.model
    attended = attended_tokens(model, layout.batch.sequence_length)
    return 2 * model.depth * layer_parameters(model) + 4 * model.query_width * attended


def _seconds(traffic: Traffic, layout: Layout, cluster: Cluster, assumptions: Assumptions) -> float:
    members, gpu = _members_on_a_node(traffic, layout, cluster), cluster.gpu
    bandwidth = float("inf")
    if members > 1:
        bandwidth = gpu.link_bytes if members <= gpu.link_ranks else gpu.host_link_bytes
    if members < traffic.ranks:
        # Each member on a node has a network adapter, and NCCL runs a ring over each.
        bandwidth = min(bandwidth, gpu.network_bytes * members)
    return traffic.wire_bytes / (bandwidth * assumptions.link_efficiency.value)


def _hides(traffic: Traffic, layout: Layout) -> bool:
    """Return whether traffic overlaps with computing: reductions at stages 2 and 3, and stage 3's prefetch."""
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
        # AdamW reads gradient, master weight and moments and writes the latter three: 28 bytes an element.
        seconds += transfers + 28 * share * cluster.gpus_per_node / assumptions.host_adam_bytes.value
    if layout.offloaded("offload_param"):
        passes = 2 * layout.batch.accumulation
        seconds += passes * layout.element * share / cluster.gpu.host_link_bytes
    return seconds
