"""Time of a step by kernel on a GPU, or by operator on a CPU, with torch.profiler."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from pause_megatron.benchmark.tensors import held_bytes, peak_growth


@dataclass(frozen=True)
class Kernel:
    """All calls of a kernel (on a CPU, an operator) in one step on this rank.

    Attributes:
        name: CUDA's name of the kernel, or torch's name of the operator.
        calls: Number of calls.
        seconds: Time on the device; on a CPU, without the operators it calls.
        share: Share of the time of all kernels of the step.
    """

    name: str
    calls: int
    seconds: float
    share: float


@dataclass
class Profile:
    """Result of the profiler, filled in when it ends.

    Attributes:
        kernels: Kernels, the longest first.
        tensor_bytes: Peak bytes of tensors on a CPU; None on a GPU, whose allocator reports them.
    """

    kernels: list[Kernel] = field(default_factory=list)
    tensor_bytes: int | None = None


@contextlib.contextmanager
def profiling(device: torch.device) -> Iterator[Profile]:
    """Profile the body, which takes one step.

    Args:
        device: Device of this rank.

    Yields:
        The result, complete after the body.
    """
    result = Profile()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)  # earlier kernels do not belong to the body
    held = 0 if cuda else held_bytes()
    # On a GPU kernels only: with operators, a step of many micro-batches has a million events.
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], profile_memory=not cuda) as recording:
        yield result
        if cuda:
            torch.cuda.synchronize(device)
    result.kernels = _by_time(recording, cuda)
    result.tensor_bytes = None if cuda else held + peak_growth(recording)


def _by_time(recording: profile, cuda: bool) -> list[Kernel]:
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    for event in recording.events():
        if event.is_user_annotation or (event.device_type.name == "CUDA") != cuda or event.name == "[memory]":
            continue
        calls[event.name] += 1
        micros[event.name] += event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
    total = sum(micros.values()) or 1.0
    names = sorted(micros, key=micros.__getitem__, reverse=True)
    return [Kernel(name, calls[name], micros[name] / 1e6, micros[name] / total) for name in names]
