"""What a benchmark found, and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pause_megatron.benchmark.kernels import Kernel
from pause_megatron.benchmark.machine import Machine
from pause_megatron.config.batching import BatchPlan
from pause_megatron.config.schema import ResolvedConfig

FORMAT = "pause-megatron benchmark"
VERSION = 1


@dataclass(frozen=True)
class StartUp:
    """Seconds on rank 0 until the first step could begin: process groups, windows, model, engine."""

    groups: float
    windows: float
    model: float
    engine: float


@dataclass(frozen=True)
class Waits:
    """How often the host waited for the device (`pause_megatron.engine.waits`).

    Attributes:
        per_micro_batch: in a forward and backward pass
        per_step: in a step, outside of these
    """

    per_micro_batch: float
    per_step: float


@dataclass(frozen=True)
class Memory:
    """Of tensors on the rank that took most.

    Attributes:
        peak_bytes: on a GPU from the start to the last timed step; on a CPU in the profiled step of rank 0
        reserved_bytes: what torch's allocator took from the GPU for them; None on a CPU
        planned_bytes: what `plan` says of the tensors
    """

    peak_bytes: int
    reserved_bytes: int | None
    planned_bytes: int


@dataclass(frozen=True)
class Measurement:
    """What a machine did with a configuration.

    Attributes:
        config: that ran
        batch: its batches
        stage: of ZeRO
        parameters: of the whole model
        vocabulary: ids of text and pauses
        windows: what the steps read, in a few words
        machine: where
        kernels: of rotary embedding, SwiGLU and cross-entropy
        warmup_steps: taken before those that count
        step_seconds: of each step that counts, from the end of the one before it
        raw_tokens, text_tokens, targets: of a step over all ranks, mean; padding left out
        flops: of a step over all ranks, of the rows that are really computed (`config.presets.step_flops`)
        peak_flops: of one device, FLOP/s; None: not known
        memory: of a rank
        waits: of one step on rank 0, taken behind those that count
        kernels_by_time: of one step on rank 0, likewise; the longest first
        start_up: of rank 0
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
        """Of a step."""
        return statistics.median(self.step_seconds)

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs of one rank in a second of the median step."""
        return self.flops / (self.median_seconds * self.machine.ranks)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over peak FLOPs; None without a known peak."""
        return None if self.peak_flops is None else self.flops_per_second / self.peak_flops


def as_record(found: Measurement) -> dict[str, Any]:
    """Everything in bytes, seconds and FLOPs, for `json.dumps`. `plan --measured` reads it."""
    median, machine, memory = found.median_seconds, found.machine, found.memory
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": found.config.model_dump(mode="json"),
        "machine": {
            "device": machine.device,
            "cuda_name": machine.cuda_name,
            "gpu": machine.gpu,
            "ranks": machine.ranks,
            "python": machine.python,
            **{name.replace("-", "_"): version for name, version in machine.packages.items()},
        },
        "kernels": found.kernels,
        "windows": found.windows,
        "vocabulary": found.vocabulary,
        "steps": len(found.step_seconds),
        "warmup_steps": found.warmup_steps,
        "step_seconds": {"median": median, "low": min(found.step_seconds), "high": max(found.step_seconds)},
        "raw_tokens_per_step": found.raw_tokens,
        "text_tokens_per_step": found.text_tokens,
        "targets_per_step": found.targets,
        "raw_tokens_per_second": found.raw_tokens / median,
        "text_tokens_per_second": found.text_tokens / median,
        "flops_per_step": found.flops,
        "peak_flops": found.peak_flops,
        "mfu": found.mfu,
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "planned_bytes": memory.planned_bytes,
        },
        "host_waits": vars(found.waits),
        "start_up_seconds": vars(found.start_up),
        "top_kernels": [
            {
                "name": kernel.name,
                "calls_per_step": kernel.calls,
                "seconds_per_step": kernel.seconds,
                "share": kernel.share,
            }
            for kernel in found.kernels_by_time
        ],
    }
