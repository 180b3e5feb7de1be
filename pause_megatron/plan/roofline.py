"""Seconds of computing in a step, from the work of a GPU and its assumed speeds (roofline model)."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.gpus import Gpu
from pause_megatron.plan.kernel_work import Work
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.machine import Assumptions
from pause_megatron.plan.work import step_work


@dataclass(frozen=True)
class Computing:
    """Seconds of a step on one GPU, without communication.

    Attributes:
        products: Matrix products.
        attention: Attention.
        memory: Memory-bound kernels of forward and backward passes.
        update: Sums and copies of gradients, their norm, the optimizer, new weights.
        waiting: Waiting for the host, where it launches kernels more slowly than they run.
    """

    products: float
    attention: float
    memory: float
    update: float
    waiting: float

    @property
    def seconds(self) -> float:
        """Seconds of all kinds."""
        return self.products + self.attention + self.memory + self.update + self.waiting


def computing(layout: Layout, gpu: Gpu, assumptions: Assumptions) -> Computing:
    """Return the seconds of a step; kernels run one after another, each at the speed that bounds it.

    Args:
        layout: A run on its ranks.
        gpu: Kind of GPU.
        assumptions: Efficiencies and launch time.
    """
    work = step_work(layout)
    micro, times = _kernels(work.micro_batch, layout, gpu, assumptions), work.micro_batches
    update = _kernels(work.gradients + work.update, layout, gpu, assumptions)
    launching = assumptions.launch_seconds.value
    waiting = times * max(0.0, work.micro_batch.kernels * launching - sum(micro))
    waiting += max(0.0, (work.gradients + work.update).kernels * launching - sum(update))
    products, attention, memory = (times * seconds for seconds in micro)
    return Computing(products, attention, memory, sum(update), waiting)


def _kernels(work: Work, layout: Layout, gpu: Gpu, assumptions: Assumptions) -> tuple[float, float, float]:
    """Return the seconds of matrix products, of attention, and of memory-bound kernels."""
    model = layout.model
    width, channels = model.hidden / layout.tensor, model.channels
    products = assumptions.product_efficiency.value * width / (width + assumptions.product_half_width.value)
    attention = assumptions.attention_efficiency.value * channels / (channels + assumptions.attention_half_width.value)
    return (
        work.products / (gpu.peak_flops * products),
        work.attention / (gpu.peak_flops * attention),
        work.bytes / (gpu.memory_bandwidth * assumptions.memory_efficiency.value),
    )
