"""P9: `plan` for 1B on 1024 ranks (targets: < 5 s, < 1 GB), start of the program included.

python -m tests.benchmarks.plan [--rounds 7]

A fresh process each round: wall time, and the high-water mark of its resident set.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

COMMAND = ("plan", "--recipe", "c4-1b-pause", "--nodes", "128", "--gpu", "a100-40,a100-80,h100,h100-94,h200")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pause_megatron", *COMMAND, "batch.global_size=4096"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    low, _, high = statistics.quantiles(seconds, n=4)
    print(
        f"P9 plan, 1B on 1024 ranks, 5 kinds of GPU: {statistics.median(seconds):.2f} s [{low:.2f} .. {high:.2f}] "
        f"(< 5), {peak:.0f} MB (< 1000), {rounds} rounds"
    )


if __name__ == "__main__":
    main()
