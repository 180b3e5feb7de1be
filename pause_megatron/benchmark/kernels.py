"""Where the time of a step goes: kernels on a GPU, operators on a CPU, by torch.profiler."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Kernel:
    """What all calls of a kernel (an operator, on a CPU) took in one step on this rank.

    Attributes:
        name: CUDA's of the kernel, torch's of the operator
        calls: of it
        seconds: on the device; on a CPU without what it calls itself
        share: of the seconds of all kernels of the step
    """

    name: str
    calls: int
    seconds: float
    share: float


@contextlib.contextmanager
def profiling(device: torch.device) -> Iterator[list[Kernel]]:
    """Profile the body, which takes one step. The list is filled when it ends: longest first."""
    kernels: list[Kernel] = []
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)  # what was begun before is not the body's
    # On a GPU kernels alone: operators as well would be a million events for a step of many micro-batches.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recording:
        yield kernels
        if cuda:
            torch.cuda.synchronize(device)
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    for event in recording.events():
        if event.is_user_annotation or (event.device_type == DeviceType.CUDA) != cuda:
            continue
        calls[event.name] += 1
        micros[event.name] += event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
    total = sum(micros.values()) or 1.0
    for name in sorted(micros, key=micros.__getitem__, reverse=True):
        kernels.append(Kernel(name, calls[name], micros[name] / 1e6, micros[name] / total))
