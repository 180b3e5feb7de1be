"""The command: stages of a declared experiment, on several processes of one thread."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

from pause_megatron.errors import PauseMegatronError

from ..timing import environment
from . import __doc__ as description
from . import results
from .declaration import Declared, committed, read
from .report import write_report
from .runs import Job, one_thread, perform
from .settings import plans

STAGES = ("tuning", "final", "report")


def run(jobs: list[Job], file: Path, processes: int) -> None:
    """Makes runs and writes a line for each; models are trained in processes that import torch once."""
    if not jobs:
        return
    done = 0
    with multiprocessing.get_context("spawn").Pool(processes, one_thread) as pool:
        for lines in pool.imap_unordered(perform, jobs):
            results.append(file, lines)
            done += 1
            for line in lines:
                what = f"{line['phase']} {line['setting']} seed {line['seed']} rate {line['learning_rate']:g}"
                print(f"{done}/{len(jobs)}: {what}: {100 * line['accuracy']:.1f} %, {line['cpu']} s", flush=True)


def work(declared: Declared, output: Path, stages: list[str], names: list[str], processes: int, command: str) -> None:
    """Runs the stages that were asked for, each from what NAME.jsonl already holds."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{declared.path.stem}.jsonl"

    def lines() -> results.Lines:
        return results.read_results(file, declared.digest)

    def some(jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if not names or job.setting in names]

    if "tuning" in stages:
        run(some(results.tuning_jobs(declared, lines())), file, processes)
    if "final" in stages:
        committed(declared.path)
        run(some(results.final_jobs(declared, lines())), file, processes)
    if "report" in stages:
        machine = environment("torch", "megatron-core", "deepspeed", "transformers")
        when, numbers = committed(declared.path), plans(declared.content)
        write_report(declared, numbers, lines(), output, committed=when, command=command, machine=machine)
        print(f"wrote {file.with_suffix('.md')} and {file.with_suffix('.png')}")


def main() -> int:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("declaration", help="a YAML file, or the name of one that ships")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--stages", default=",".join(STAGES), help="some of tuning, final, report")
    parser.add_argument("--settings", help="tune and train only these; the report needs all")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a core each")
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    one_thread()
    names = arguments.settings.split(",") if arguments.settings else []
    command = f"python -m tests.benchmarks.pauses_matter {' '.join(sys.argv[1:])}"
    try:
        work(read(arguments.declaration), arguments.output, stages, names, arguments.jobs, command)
    except PauseMegatronError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
