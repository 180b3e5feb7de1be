"""What becomes of a run under faults with plain DeepSpeed or megatron-core, and of one of this program.

python tests/benchmarks/reliability.py --results FOLDER --output reliability.md
python tests/benchmarks/reliability.py --results FOLDER --only flips index

kills         R1   kill -9 before a file call of a save that is drawn at random; then the same program starts again
delays        R2   one rank is held at each of its file calls of a save in turn, and killed with the others
damage        R3   one file of the newest checkpoint is damaged, or two are swapped
flips         R14  one bit flipped in any file of the newest checkpoint, metadata included
prune         R15  newer checkpoints damaged, resume, save, prune, again and again
orphans       R16  kill -9 of torchrun alone
pipes         R16  the reader of a pipe, a device, a folder or the terminal is gone
disagreement  R17  one rank of two was given another configuration
index         R17  a corpus prepared anew under its name

The counts of a kind and a system are a file in FOLDER as soon as they are known; what is there is not run again.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.faults.disagreement import DIFFERENCES, disagreement
from benchmarks.faults.flips import flips
from benchmarks.faults.orphans import orphans
from benchmarks.faults.pipes import pipes
from benchmarks.faults.pruning import prune
from benchmarks.faults.results import Result, markdown
from benchmarks.faults.saves import damage, delays, kills
from benchmarks.faults.stale_index import stale_index

OURS = "pause-megatron"
INTRODUCTION = (
    "CPU and gloo. DeepSpeed: `save_checkpoint` / `load_checkpoint` as documented, no tag given on loading; it deletes "
    "no checkpoints, so what its users do stands in for that: all but the newest few are removed by name. `refused` "
    "needs a person: no restart resumes by itself."
)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: called with a system and a count; the count by default; what is beside this program."""

    run: Callable[[str, int], Result]
    count: int
    other: str = "deepspeed"


KINDS = {
    "kills": Kind(kills, 200),
    "delays": Kind(delays, 10**6),
    "damage": Kind(damage, 200),
    "flips": Kind(flips, 2500),
    "prune": Kind(prune, 100),
    "orphans": Kind(orphans, 20),
    "pipes": Kind(pipes, 5),
    "disagreement": Kind(disagreement, len(DIFFERENCES)),
    "index": Kind(stale_index, 50, "megatron-core"),
}


def run(name: str, system: str, count: int, path: Path) -> Result:
    """The counts of one kind and system: those in the file, or new ones, which are then there."""
    if path.exists():
        return Result.read(path)
    import deepspeed
    import torch

    print(f"{name}: {system}", file=sys.stderr, flush=True)
    result = KINDS[name].run(system, count)
    result.command = (
        f"`--only {name} --count {count}`; DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores"
    )
    result.write(path)
    return result


def main() -> None:
    """Runs what is not there yet, and writes the tables of everything that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="default: all")
    parser.add_argument("--systems", nargs="+", help="default: all")
    parser.add_argument("--count", type=int, help="of each kind; default: " + ", ".join(
        f"{kind.count} {name}" for name, kind in KINDS.items() if kind.count < 10**6
    ))  # fmt: skip
    parser.add_argument("--results", type=Path, required=True, help="folder of the counts, a file for each kind")
    parser.add_argument("--before", type=Path, help="such a folder, of an older version of this program: a column more")
    parser.add_argument("--output", type=Path, help="the tables as Markdown")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    lines = ["# Reliability beside plain DeepSpeed and megatron-core", ""]
    lines += [f"`python tests/benchmarks/reliability.py`; {INTRODUCTION}", ""]
    for name, kind in KINDS.items():
        columns: dict[str, Result] = {}
        for system in (kind.other, OURS):
            path = args.results / f"{name}-{system}.json"
            if name in args.only and (args.systems is None or system in args.systems):
                columns[system] = run(name, system, args.count or kind.count, path)
            elif path.exists():
                columns[system] = Result.read(path)
            before = args.before and args.before / path.name
            if system == OURS and before and before.exists():
                columns[f"{OURS}, before"] = Result.read(before)
        if columns:
            lines += [*markdown(columns), "; ".join(dict.fromkeys(each.command for each in columns.values())) + ".", ""]
    text = "\n".join(lines)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
