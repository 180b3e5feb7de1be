"""Times of calls on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SPIN_CYCLES = 4_000_000  # about 2 ms, longer than the launch of a call


def seconds_of(call: Callable[[], object], device: str, rounds: int = 9, warmup: int = 3) -> float:
    """Median time of a call in seconds; on a GPU between events.

    The GPU spins first, until the host has launched the call: its time does not count, also where it is the longer one.
    """
    for _ in range(warmup):
        call()
    if device != "cuda":
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in marks:
        torch.cuda._sleep(SPIN_CYCLES)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3
