"""Run everything that needs a GPU, in order of value, and leave a report that is complete after every part.

Called by launchers/gpu_check.sh. A part is a selection of the tests in this folder, in a process of its own with a time
limit and a log: one that crashes or hangs does not stop the others. Without a GPU the parts that a CPU has are run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from child import Child
from report import Report
from wheels import ROOT, look, unpack

EXIT_FAILED, EXIT_INCOMPLETE = 1, 2
LEAST_SECONDS = 10  # with less time than this no part is begun


class Part(NamedTuple):
    """A selection of tests.

    Attributes:
        name: in the report.
        seconds: the longest that it may take.
        tests: arguments of pytest.
        alone: it measures times, so nothing may run beside it.
    """

    name: str
    seconds: float
    tests: tuple[str, ...]
    alone: bool = False


PARTS = (
    Part("versions", 60, ("tests/gpu/test_versions_gpu.py",), alone=True),
    Part("kernels", 90, ("tests/gpu/test_kernels_gpu.py", "-k", "not compiled"), alone=True),
    Part("numerics", 100, ("tests/gpu/test_numerics_gpu.py",)),
    Part("speed", 165, ("tests/gpu/test_speed_gpu.py",), alone=True),
    Part("zero", 90, ("tests/gpu/test_zero_gpu.py",)),
    Part("resume", 90, ("tests/gpu/test_resume_gpu.py",)),
    Part("spans", 60, ("tests/gpu/test_variable_length_gpu.py",)),
    Part("signals", 130, ("tests/gpu/test_signals_gpu.py",)),
    Part("command line", 120, ("tests/gpu/test_command_line_gpu.py",)),
    Part("two ranks", 150, ("tests/gpu/test_two_ranks_gpu.py",)),
    # Last, because each shape is compiled anew, and `auto` never means it.
    Part("compiled", 120, ("tests/gpu/test_kernels_gpu.py", "-k", "compiled")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Look for what is missing, run the parts. Returns 0, 1 if a part failed, 2 if a package is missing."""
    parser = argparse.ArgumentParser(
        "gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output", nargs="?", default="runs/gpu-check", type=Path, help="folder of the report (default: runs/gpu-check)"
    )
    parser.add_argument("--parts", help=f"only these, with commas between: {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together (default: 480)")
    parser.add_argument(
        "--wheels", type=Path, default=os.environ.get("WHEELS") or None, help="folder of wheels to install"
    )
    options = parser.parse_args(arguments)
    names = (
        [part.name for part in PARTS] if options.parts is None else [name.strip() for name in options.parts.split(",")]
    )
    if unknown := set(names) - {part.name for part in PARTS}:
        known = ", ".join(part.name for part in PARTS)
        parser.error(f"--parts: expected names out of {known}; got {', '.join(sorted(unknown))}")
    if options.seconds < LEAST_SECONDS:
        parser.error(f"--seconds: expected at least {LEAST_SECONDS}, got {options.seconds:g}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"OUT: expected a folder, got the file {options.output}")
    parts = [part for part in PARTS if part.name in names]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"OUT: {options.output} cannot be made: {error.strerror}")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        report = Report(options.output, [part.name for part in parts])
        places = _prepare(report, options.wheels, Path(scratch) / "site")
        if places is None:
            return EXIT_INCOMPLETE
        run_parts(parts, report, Path(scratch), seconds=options.seconds, places=places)
    return EXIT_FAILED if report.failed else 0


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _prepare(report: Report, wheels: Path | None, site: Path) -> list[str] | None:
    """Where the children find packages; None if they would not find all. Nothing is imported for this."""
    if wheels is not None:
        report.say(f"wheels: installing those in {wheels}")
        if trouble := unpack(Path(wheels), site):
            report.close(trouble)
            return None
        report.installed([str(site)])
    places = [str(site)] if wheels is not None else []
    wanting = look([*places, *sys.path[1:]], folder=str(wheels or "WHEELS"))
    if wanting.outside:
        report.warn(f"versions outside of the tested ranges: {'; '.join(wanting.outside)}")
    if wanting.fetch:
        report.warn(f"missing or outside: a machine with a network fetches wheels with: {wanting.fetch}")
        report.warn(f"then: WHEELS={wheels or 'WHEELS'} bash launchers/gpu_check.sh {report.folder}")
    if wanting.absent:
        report.close(f"missing packages: {', '.join(wanting.absent)}")
        return None
    return places


def run_parts(
    parts: Sequence[Part], report: Report, scratch: Path, *, seconds: float, places: Sequence[str] = ()
) -> None:
    """Start the parts in their order, as many at a time as there are cores for, and report each when it ends.

    Args:
        parts: what to run.
        report: rewritten after every part.
        scratch: folder for logs and for what the parts share.
        seconds: after so many no part goes on.
        places: folders that come first in the parts' PYTHONPATH.
    """
    cores = len(os.sched_getaffinity(0))
    at_once = min(4, max(1, cores // 4))
    end = time.monotonic() + seconds
    environment = _environment(scratch, report.folder, places, cores)
    waiting, running = list(parts), []
    try:
        while waiting or running:
            while waiting and _may_start(waiting[0], running, at_once):
                part, left = waiting.pop(0), end - time.monotonic()
                if left < LEAST_SECONDS:
                    report.left_out(part.name, f"the {seconds:g} s of all parts are over")
                    continue
                report.started(part.name)
                limit = min(part.seconds, left)
                running.append((part, Child(part.name, part.tests, limit, scratch, environment)))
            for part, child in [pair for pair in running if pair[1].ended()]:
                running.remove((part, child))
                report.finished(child.outcome())
            time.sleep(0.05)
    finally:
        for _, child in running:
            child.kill()
            report.finished(child.outcome(stopped=True))
        report.close("stopped before its end" if waiting or running else "")


def _may_start(part: Part, running: Sequence[tuple[Part, Child]], at_once: int) -> bool:
    if part.alone or any(other.alone for other, _ in running):
        return not running
    return len(running) < at_once


def _environment(scratch: Path, output: Path, places: Sequence[str], cores: int) -> dict[str, str]:
    """What every part is given."""
    shared = scratch / "shared"
    shared.mkdir()
    path = [*places, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONWARNINGS": "ignore",  # logs are short, and read in haste
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GPU_CHECK_SHARED": str(shared),
        "GPU_CHECK_OUTPUT": str(output.resolve()),
    }
    return {"OMP_NUM_THREADS": str(max(1, cores // 4)), **os.environ, **given}


if __name__ == "__main__":
    sys.exit(main())
