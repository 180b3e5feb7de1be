"""Runs the cells of a grid on this machine, several at a time, each after the one that it begins from. No torch."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue

from pause_megatron.errors import PauseMegatronError
from pause_megatron.experiment.devices import share_of, visible_gpus
from pause_megatron.experiment.execute import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    Outcome,
    Stop,
    alone_or_deepspeed,
    last_lines,
    run_cell,
)
from pause_megatron.experiment.folder import Placed

Say = Callable[[str], None]


@dataclass
class _Progress:
    """How far a run is, and what it says."""

    total: int
    jobs: int
    say: Say
    begun: float = field(default_factory=time.monotonic)
    cached: int = 0
    done: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def started(self, entry: Placed) -> None:
        self.say(f"{self._counter()} start   {entry.cell.name}")

    def ended(self, entry: Placed, outcome: Outcome, left: Mapping[str, int]) -> None:
        """Tell how a cell ended.

        Args:
            left: cells that are still to come, by verb.
        """
        if outcome.code == EXIT_DONE:
            self.done += 1
            self.seconds[entry.cell.verb].append(outcome.seconds)
            self.say(f"{self._counter()} done    {entry.cell.name}  {outcome.seconds:.0f} s{self._eta(left)}")
        elif outcome.code == EXIT_STOPPED:
            self.say(f"{self._counter()} stopped {entry.cell.name}; the same command goes on")
        else:
            self.failed.append(entry.cell.name)
            log, end = entry.folder / "log.txt", last_lines(entry.folder)
            self.say(f"{self._counter()} FAILED  {entry.cell.name}: exit code {outcome.code}, {log}\n{end}")

    def _counter(self) -> str:
        return f"[{self.cached + self.done}/{self.total}]"

    def _eta(self, left: Mapping[str, int]) -> str:
        """Time that is left, from the mean of the verbs that have been seen."""
        known = {verb: sum(times) / len(times) for verb, times in self.seconds.items()}
        if not sum(left.values()) or any(count and verb not in known for verb, count in left.items()):
            return ""
        seconds = sum(count * known.get(verb, 0.0) for verb, count in left.items()) / self.jobs
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def run_local(placed: Mapping[str, Placed], *, jobs: int, stop: Stop, say: Say = print) -> int:
    """Run every cell that is not done.

    A cell that fails stops those that need it, and no others.

    Args:
        placed: by fingerprint, inputs first. jobs: cells at a time.
        stop: asked to stop, the running verbs are told so and nothing starts any more.
        say: told about every start and end.

    Returns:
        EXIT_DONE, EXIT_FAILED if a cell failed, EXIT_STOPPED if asked to stop.
    """
    waiting = {fingerprint: entry for fingerprint, entry in placed.items() if not entry.done}
    finished = set(placed) - set(waiting)
    progress = _Progress(len(placed), jobs, say, cached=len(finished))
    say(f"{len(placed)} cells: {len(finished)} done before, {len(waiting)} to run, {jobs} at a time")
    running: dict[Future[Outcome], Placed] = {}
    gpus, places = visible_gpus(), SimpleQueue()  # a place is a share of the GPUs
    for place in range(jobs):
        places.put(place)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for fingerprint, entry in _ready(waiting, finished)[: jobs - len(running)]:
                if stop.asked:
                    break
                progress.started(entry)
                running[pool.submit(_attempt, entry, gpus, places, stop, say)] = waiting.pop(fingerprint)
            if not running:
                break
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                entry = running.pop(future)
                if future.result().code == EXIT_DONE:
                    finished.add(entry.cell.fingerprint)
                progress.ended(entry, future.result(), _by_verb([*waiting.values(), *running.values()]))
    return _conclude(progress, waiting, stop, say)


def set_threads(jobs: int, ranks: int) -> None:
    """Give every rank its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _ready(waiting: Mapping[str, Placed], finished: set[str]) -> list[tuple[str, Placed]]:
    """Cells whose input is done, in the order of the plan."""
    return [
        (fingerprint, entry)
        for fingerprint, entry in waiting.items()
        if entry.cell.input is None or entry.cell.input.fingerprint in finished
    ]


def _attempt(entry: Placed, gpus: tuple[str, ...], places: SimpleQueue[int], stop: Stop, say: Say) -> Outcome:
    """Run a cell on its share of the GPUs; what goes wrong around its verb fails this cell alone."""
    place = places.get()

    def launch(program: Sequence[str], ranks: int) -> list[str]:
        return alone_or_deepspeed(program, ranks, share_of(gpus, place, ranks))

    try:
        return run_cell(entry.folder, launch, stop, say)
    except (PauseMegatronError, OSError) as error:
        say(f"{entry.cell.name}: {error}")
        return Outcome(EXIT_FAILED)
    finally:
        places.put(place)


def _by_verb(entries: list[Placed]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for entry in entries:
        found[entry.cell.verb] += 1
    return found


def _conclude(progress: _Progress, waiting: Mapping[str, Placed], stop: Stop, say: Say) -> int:
    minutes = (time.monotonic() - progress.begun) / 60
    say(
        f"{progress.cached + progress.done} of {progress.total} cells done ({progress.done} now, in {minutes:.1f} "
        f"min); {len(progress.failed)} failed, {len(waiting)} not run"
    )
    if progress.failed:
        say("failed: " + ", ".join(progress.failed))
        return EXIT_FAILED
    return EXIT_STOPPED if stop.asked else EXIT_DONE
