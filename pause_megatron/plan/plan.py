"""The plan of a run on one kind of GPU, from its configuration to days and GPU-hours."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.plan.communication import step_traffic
from pause_megatron.plan.fit import Footprint, Remedy, footprint, largest_micro_size, memory_micro_size, remedies
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.machine import Assumptions, Cluster
from pause_megatron.plan.memory import RankMemory, rank_memory
from pause_megatron.plan.saving import SavePlan, save_plan
from pause_megatron.plan.timing import StepTime, Wire, step_time


@dataclass(frozen=True)
class Plan:
    """Memory, communication and time of a run.

    Attributes:
        layout: The run on its ranks.
        cluster: Nodes and GPUs.
        assumptions: Assumed numbers.
        memory: Tensors of a rank by phase and kind.
        footprint: Memory of a GPU, with fragmentation and libraries, against its capacity.
        time: Time of a step.
        wires: Communication of a step.
        saving: Best checkpoint interval.
        largest_micro_size: Largest micro-batch that fits and divides a rank's share of the global batch; None for none.
        memory_micro_size: Largest micro-batch that fits with any global batch; 0 for none.
        remedies: Changes with which the run fits, where it does not.
        warnings: Settings that are allowed but slow.
    """

    layout: Layout
    cluster: Cluster
    assumptions: Assumptions
    memory: RankMemory
    footprint: Footprint
    time: StepTime
    wires: tuple[Wire, ...]
    saving: SavePlan
    largest_micro_size: int | None
    memory_micro_size: int
    remedies: tuple[Remedy, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits on its GPUs."""
        return self.footprint.fits

    @property
    def mfu(self) -> float:
        """Model FLOPs over peak FLOPs of the whole step, communication and recomputation included."""
        return self.time.model_flops / (self.time.seconds * self.cluster.ranks * self.cluster.gpu.peak_flops)

    @property
    def computing_mfu(self) -> float:
        """Model FLOPs over peak FLOPs while the GPUs compute."""
        return self.time.model_flops / (self.time.compute_seconds * self.cluster.ranks * self.cluster.gpu.peak_flops)

    @property
    def run_seconds(self) -> float | None:
        """Seconds of all steps, saves and failures; None where the number of steps is not known."""
        steps = self.layout.batch.steps
        return None if steps is None else steps * self.time.seconds / max(1 - self.saving.lost, 0.01)


def make_plan(
    config: ResolvedConfig, cluster: Cluster, *, text_size: int, assumptions: Assumptions | None = None
) -> Plan:
    """Plan a run.

    Args:
        config: Resolved configuration.
        cluster: Nodes and GPUs.
        text_size: Ids of the text vocabulary.
        assumptions: Assumed numbers; None for those of `Assumptions.of` the GPU.

    Raises:
        ConfigError: The ranks or the batch do not divide, or the DeepSpeed file cannot be used.
    """
    assumptions = assumptions or Assumptions.of(cluster.gpu)
    layout = Layout.of(config, cluster.ranks, text_size)
    memory = rank_memory(layout)
    size = footprint(memory, cluster, assumptions)
    time, wires = step_time(layout, step_traffic(layout), cluster, assumptions)
    return Plan(
        layout=layout,
        cluster=cluster,
        assumptions=assumptions,
        memory=memory,
        footprint=size,
        time=time,
        wires=wires,
        saving=save_plan(layout, cluster, time.seconds, assumptions),
        largest_micro_size=largest_micro_size(config, text_size, cluster, assumptions),
        memory_micro_size=memory_micro_size(layout, cluster, assumptions),
        remedies=() if size.fits else tuple(remedies(config, text_size, cluster, assumptions)),
        warnings=tuple(_warnings(layout, cluster)),
    )


def _warnings(layout: Layout, cluster: Cluster) -> list[str]:
    warnings = []
    if layout.tensor > cluster.gpus_per_node:
        warnings.append(
            f"parallel.tensor={layout.tensor} spans nodes of {cluster.gpus_per_node} GPUs: every layer then "
            f"communicates over the network; use at most {cluster.gpus_per_node}, and a higher ZeRO stage or "
            "recomputation for memory"
        )
    elif cluster.gpus_per_node % layout.tensor:
        warnings.append(
            f"parallel.tensor={layout.tensor} does not divide the {cluster.gpus_per_node} GPUs of a node: some "
            "tensor-parallel groups span nodes"
        )
    if layout.stage == 2 and layout.batch.accumulation > 1:
        warnings.append(
            f"ZeRO stage 2 reduces gradients after each of {layout.batch.accumulation} micro-batches, stages 0 and 1 "
            "once a step: prefer stage 1, or a larger batch.micro_size, where memory allows"
        )
    if layout.config.task.name is not None and layout.config.model.from_ is None:
        warnings.append(
            f"model.from is not given: these are the sizes of model.preset={layout.config.model.preset}, not of the "
            "model that will be finetuned"
        )
    if layout.config.engine.precision == "fp32":
        warnings.append("engine.precision=fp32 is far below the bf16 peak from which times are estimated")
    return warnings
