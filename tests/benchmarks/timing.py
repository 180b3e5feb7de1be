"""Side-by-side timing: the contestants take turns (A B A B ...), so that a drifting machine hurts them all alike."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Timing:
    """One contestant's time and its ratio to the baseline (the first contestant).

    Attributes:
        seconds: Median over the rounds.
        ratio: Median over the rounds of (this one's time / the baseline's time in the same round).
        low, high: Quartiles of those ratios (25 %, 75 %): the spread.
        rounds: How many rounds were counted.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.seconds * 1e6:.1f} us, ratio {self.ratio:.3f} [{self.low:.3f} .. {self.high:.3f}]"


def compare(
    contestants: dict[str, Callable[[], object]],
    rounds: int = 9,
    warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times callables in turn, `rounds` times, and compares each with the first.

    The ratio is taken within a round, then its median over rounds: slow drift cancels. Every other round runs the
    contestants in reverse order, so that none always profits from what the one before it left in the caches.

    Args:
        contestants: Name -> callable of no argument. The first is the baseline. Each call should last >= 10 ms.
        rounds: Counted rounds, at least 7.
        warmup: Uncounted calls of each contestant beforehand.
        synchronize: Called before each reading of the clock (`torch.cuda.synchronize` on a GPU).

    Returns:
        Name -> Timing, in the order given.

    Raises:
        ValueError: fewer than 7 rounds or fewer than one contestant.
    """
    if rounds < 7 or not contestants:
        raise ValueError(f"expected at least 7 rounds and one contestant, got {rounds} and {len(contestants)}")
    synchronize = synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        for _ in range(warmup):
            call()
    collecting = gc.isenabled()
    # What lives now (torch, megatron-core) is set aside: looking at it before each call is slow and empties the caches.
    gc.collect()
    gc.freeze()
    try:
        for round_number in range(rounds):
            order = list(contestants.items())
            for name, call in order if round_number % 2 == 0 else reversed(order):
                gc.collect()
                gc.disable()
                synchronize()
                start = time.perf_counter()
                call()
                synchronize()
                seconds[name].append(time.perf_counter() - start)
                if collecting:
                    gc.enable()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    baseline = next(iter(seconds.values()))
    timings = {}
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, baseline, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        timings[name] = Timing(statistics.median(times), statistics.median(ratios), low, high, rounds)
    return timings


def environment(*packages: str) -> str:
    """One line: machine, Python and the versions of the named packages (as installed; "absent" if not)."""
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return ", ".join([_processor(), platform.platform(terse=True), f"Python {platform.python_version()}", *versions])


def _processor() -> str:
    """Model name of the first processor and the number of cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} ({cores} cores)"
