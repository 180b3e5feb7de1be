"""Running the cells of a grid on this machine, several at a time, each after its input cells."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue

from pause_megatron.errors import PauseMegatronError
from pause_megatron.experiment.devices import gpus_of_slot, visible_gpus
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
from pause_megatron.experiment.folder import LocatedCell

log = logging.getLogger(__name__)


@dataclass
class _Summary:
    """Counts and durations of the cells that have run, and the messages about them."""

    total: int
    jobs: int
    start: float = field(default_factory=time.monotonic)
    cached: int = 0
    done: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def started(self, entry: LocatedCell) -> None:
        """Log the start of a cell."""
        log.info(f"{self._counter()} start   {entry.cell.name}")

    def ended(self, entry: LocatedCell, outcome: Outcome, remaining: Mapping[str, int]) -> None:
        """Count a cell that ended, and log how.

        Args:
            entry: The cell.
            outcome: How it ended.
            remaining: Number of remaining cells by verb.
        """
        if outcome.code == EXIT_DONE:
            self.done += 1
            self.seconds[entry.cell.verb].append(outcome.seconds)
            log.info(f"{self._counter()} done    {entry.cell.name}  {outcome.seconds:.0f} s{self._eta(remaining)}")
        elif outcome.code == EXIT_STOPPED:
            log.info(f"{self._counter()} stopped {entry.cell.name}; the same command resumes it")
        else:
            self.failed.append(entry.cell.name)
            path, end = entry.folder / "log.txt", last_lines(entry.folder)
            log.info(f"{self._counter()} FAILED  {entry.cell.name}: exit code {outcome.code}, {path}\n{end}")

    def exit_code(self, waiting: int, stop: Stop) -> int:
        """Log the counts and return the exit code.

        Args:
            waiting: Number of cells that did not run.
            stop: The request to stop.
        """
        minutes = (time.monotonic() - self.start) / 60
        log.info(
            f"{self.cached + self.done} of {self.total} cells done ({self.done} now, in {minutes:.1f} "
            f"min); {len(self.failed)} failed, {waiting} not run"
        )
        if self.failed:
            log.info("failed: " + ", ".join(self.failed))
            return EXIT_FAILED
        return EXIT_STOPPED if stop.requested else EXIT_DONE

    def _counter(self) -> str:
        return f"[{self.cached + self.done}/{self.total}]"

    def _eta(self, remaining: Mapping[str, int]) -> str:
        """Return the remaining time by the mean duration of each verb; "" if a verb has not run yet."""
        mean = {verb: sum(times) / len(times) for verb, times in self.seconds.items()}
        if not sum(remaining.values()) or any(count and verb not in mean for verb, count in remaining.items()):
            return ""
        seconds = sum(count * mean.get(verb, 0.0) for verb, count in remaining.items()) / self.jobs
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def run_local(located: Mapping[str, LocatedCell], *, jobs: int, stop: Stop) -> int:
    """Run every cell that is not complete. A failed cell blocks only the cells that depend on it.

    Args:
        located: The cells by fingerprint, inputs first.
        jobs: Number of cells at a time.
        stop: The request to stop; it reaches the running verbs, and no further cell starts.

    Returns:
        EXIT_DONE, EXIT_FAILED if a cell failed, or EXIT_STOPPED after a request to stop.
    """
    waiting = {fingerprint: entry for fingerprint, entry in located.items() if not entry.done}
    finished = set(located) - set(waiting)
    summary = _Summary(len(located), jobs, cached=len(finished))
    log.info(f"{len(located)} cells: {len(finished)} done before, {len(waiting)} to run, {jobs} at a time")
    running: dict[Future[Outcome], LocatedCell] = {}
    gpus = visible_gpus()
    slots: SimpleQueue[int] = SimpleQueue()  # a slot is a share of the GPUs
    for slot in range(jobs):
        slots.put(slot)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for fingerprint, entry in _ready(waiting, finished)[: jobs - len(running)]:
                if stop.requested:
                    break
                summary.started(entry)
                running[pool.submit(_attempt, entry, gpus, slots, stop)] = waiting.pop(fingerprint)
            if not running:
                break
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                entry = running.pop(future)
                if future.result().code == EXIT_DONE:
                    finished.add(entry.cell.fingerprint)
                summary.ended(entry, future.result(), _by_verb([*waiting.values(), *running.values()]))
    return summary.exit_code(len(waiting), stop)


def set_threads(jobs: int, ranks: int) -> None:
    """Set OMP_NUM_THREADS to each rank's share of the cores, unless it is set.

    Args:
        jobs: Number of cells at a time.
        ranks: Ranks of a cell.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _ready(waiting: Mapping[str, LocatedCell], finished: set[str]) -> list[tuple[str, LocatedCell]]:
    """Return the cells whose inputs are complete, in the order of the plan."""
    return [
        (fingerprint, entry)
        for fingerprint, entry in waiting.items()
        if all(source.fingerprint in finished for source in entry.cell.inputs)
    ]


def _attempt(entry: LocatedCell, gpus: tuple[str, ...], slots: SimpleQueue[int], stop: Stop) -> Outcome:
    """Run a cell on its slot's GPUs; an error around its verb fails this cell only."""
    slot = slots.get()

    def launch(program: Sequence[str], ranks: int) -> list[str]:
        return alone_or_deepspeed(program, ranks, gpus_of_slot(gpus, slot, ranks))

    try:
        return run_cell(entry.folder, launch, stop)
    except (PauseMegatronError, OSError) as error:
        log.info(f"{entry.cell.name}: {error}")
        return Outcome(EXIT_FAILED)
    finally:
        slots.put(slot)


def _by_verb(entries: Iterable[LocatedCell]) -> Mapping[str, int]:
    return Counter(entry.cell.verb for entry in entries)
