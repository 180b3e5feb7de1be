"""Where the time of a step goes: kernels on a GPU, operators on a CPU, by torch.profiler."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pause_megatron.benchmark.tensors import held_bytes, peak_growth


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


@dataclass
class Profile:
    """What the profiler saw; filled in when it ends.

    Attributes:
        kernels: the longest first
        tensor_bytes: on a CPU most bytes of tensors; None on a GPU, whose allocator knows
    """

    kernels: list[Kernel] = field(default_factory=list)
    tensor_bytes: int | None = None


@contextlib.contextmanager
def profiling(device: torch.device) -> Iterator[Profile]:
    """Profile the body, which takes one step."""
    found = Profile()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)  # what was begun before is not the body's
    held = 0 if cuda else held_bytes()
    # On a GPU kernels alone: operators as well would be a million events for a step of many micro-batches.
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], profile_memory=not cuda) as recording:
        yield found
        if cuda:
            torch.cuda.synchronize(device)
    found.kernels = _by_time(recording, cuda)
    found.tensor_bytes = None if cuda else held + peak_growth(recording)


def _by_time(recording: profile, cuda: bool) -> list[Kernel]:
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    for event in recording.events():
        if event.is_user_annotation or (event.device_type == DeviceType.CUDA) != cuda or event.name == "[memory]":
            continue
        calls[event.name] += 1
        micros[event.name] += event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
    total = sum(micros.values()) or 1.0
    names = sorted(micros, key=micros.__getitem__, reverse=True)
    return [Kernel(name, calls[name], micros[name] / 1e6, micros[name] / total) for name in names]
