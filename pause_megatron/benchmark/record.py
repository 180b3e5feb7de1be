"""Result of a benchmark, and its JSON record."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pause_megatron.benchmark.kernels import Kernel
from pause_megatron.benchmark.machine import Machine
from pause_megatron.config.batching import BatchPlan
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.plan.measured import FORMAT, VERSION


@dataclass(frozen=True)
class StartUp:
    """Start-up time on rank 0 in seconds.

    Attributes:
        groups: Process groups.
        windows: Corpus and windows.
        model: Model.
        engine: DeepSpeed engine.
    """

    groups: float
    windows: float
    model: float
    engine: float


@dataclass(frozen=True)
class Waits:
    """Synchronizations of the host with the device (`pause_megatron.engine.waits`).

    Attributes:
        per_micro_batch: Number in a forward and backward pass.
        per_step: Number in a step, outside of these passes.
    """

    per_micro_batch: float
    per_step: float


@dataclass(frozen=True)
class Memory:
    """Memory of tensors on the rank with most of them.

    Attributes:
        peak_bytes: Peak on a GPU until the last timed step; on a CPU in the profiled step of rank 0.
        reserved_bytes: Bytes that torch's allocator reserved on the GPU; None on a CPU.
        planned_bytes: Estimate of `plan`.
    """

    peak_bytes: int
    reserved_bytes: int | None
    planned_bytes: int


@dataclass(frozen=True)
class Measurement:
    """Result of a benchmark.

    Attributes:
        config: Configuration that ran.
        batch: Its batches.
        stage: ZeRO stage.
        parameters: Parameters of the whole model.
        vocabulary: Ids of text and pauses.
        windows: Description of the windows.
        machine: Device and software.
        kernels: Kernels of rotary embedding, SwiGLU and cross-entropy.
        warmup_steps: Steps before the timed ones.
        step_seconds: Duration of each timed step.
        raw_tokens: Mean tokens of a step over all ranks, without padding.
        text_tokens: Mean text tokens of a step over all ranks.
        targets: Mean targets of a step over all ranks.
        flops: FLOPs of a step over all ranks, of the rows that are computed (`config.presets.step_flops`).
        peak_flops: Peak of one device, FLOP/s; None where it is not known.
        memory: Memory of a rank.
        waits: Host synchronizations of one step on rank 0, after the timed ones.
        kernels_by_time: Kernels of one step on rank 0, after the timed ones, the longest first.
        start_up: Start-up time of rank 0.
    """

    config: ResolvedConfig
    batch: BatchPlan
    stage: int
    parameters: int
    vocabulary: int
    windows: str
    machine: Machine
    kernels: str
    warmup_steps: int
    step_seconds: tuple[float, ...]
    raw_tokens: float
    text_tokens: float
    targets: float
    flops: int
    peak_flops: float | None
    memory: Memory
    waits: Waits
    kernels_by_time: tuple[Kernel, ...]
    start_up: StartUp

    @property
    def median_seconds(self) -> float:
        """Median duration of a step."""
        return statistics.median(self.step_seconds)

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s of one rank in the median step."""
        return self.flops / (self.median_seconds * self.machine.ranks)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization; None without a known peak."""
        return None if self.peak_flops is None else self.flops_per_second / self.peak_flops


def as_record(result: Measurement) -> dict[str, Any]:
    """Return a measurement for `json.dumps`, in bytes, seconds and FLOPs; `plan --measured` reads it.

    Args:
        result: Result of a benchmark.
    """
    median, machine, memory = result.median_seconds, result.machine, result.memory
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": result.config.model_dump(mode="json"),
        "machine": {
            "device": machine.device,
            "cuda_name": machine.cuda_name,
            "gpu": machine.gpu,
            "ranks": machine.ranks,
            "python": machine.python,
            **{name.replace("-", "_"): version for name, version in machine.packages.items()},
        },
        "kernels": result.kernels,
        "windows": result.windows,
        "vocabulary": result.vocabulary,
        "steps": len(result.step_seconds),
        "warmup_steps": result.warmup_steps,
        "step_seconds": {"median": median, "low": min(result.step_seconds), "high": max(result.step_seconds)},
        "raw_tokens_per_step": result.raw_tokens,
        "text_tokens_per_step": result.text_tokens,
        "targets_per_step": result.targets,
        "raw_tokens_per_second": result.raw_tokens / median,
        "text_tokens_per_second": result.text_tokens / median,
        "flops_per_step": result.flops,
        "peak_flops": result.peak_flops,
        "mfu": result.mfu,
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "planned_bytes": memory.planned_bytes,
        },
        "host_waits": vars(result.waits),
        "start_up_seconds": vars(result.start_up),
        "top_kernels": [
            {
                "name": kernel.name,
                "calls_per_step": kernel.calls,
                "seconds_per_step": kernel.seconds,
                "share": kernel.share,
            }
            for kernel in result.kernels_by_time
        ],
    }
