"""The processes of a scoring: units in turn, progress, and a stop after the batch in progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from pause_megatron.errors import DataError
from pause_megatron.score.plan import UnitConfig
from pause_megatron.score.unit_scorer import UnitScorer
from pause_megatron.score.units import Unit

POLL_SECONDS = 0.2
_CELLS = 2
"""Shared numbers of each process: tokens that have values, and 1 + the number of the unit in progress."""


def score_units(units: Iterator[Unit], config: UnitConfig, processes: int, on_tokens: Callable[[int], None]) -> None:
    """Compute units and write their files.

    Args:
        units: The units that are not finished.
        config: What a process needs.
        processes: Number of processes; 1 uses this one.
        on_tokens: Called from time to time with the number of tokens that have values.

    Raises:
        DataError: A unit failed, or a process was killed; the message names the unit.
    """
    if processes == 1:
        _score_here(units, config, on_tokens)
        return
    context = multiprocessing.get_context("spawn")
    cells = context.Array("q", 1 + _CELLS * processes, lock=False)
    places = context.Queue()
    for place in range(processes):
        places.put(place)
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(config, cells, places))
    try:
        _collect(executor, units, processes, lambda: on_tokens(sum(cells[1::_CELLS])))
    except BrokenProcessPool:
        running = [f"{cells[at] - 1:,}" for at in range(2, len(cells), _CELLS) if cells[at]]
        during = f"while these units were computed: {', '.join(running)}" if running else "before its first unit"
        raise DataError(
            f"a process was killed {during} (out of memory? try fewer --processes or --batch-tokens); finished units "
            "are kept: run the same command again"
        ) from None
    finally:
        cells[0] = 1
        executor.shutdown(wait=True, cancel_futures=True)


def _score_here(units: Iterator[Unit], config: UnitConfig, on_tokens: Callable[[int], None]) -> None:
    done = 0

    def report(count: int) -> bool:
        nonlocal done
        done += count
        on_tokens(done)
        return True

    with _one_thread(config):
        scorer = UnitScorer(config, config.devices[0])
        for unit in units:
            scorer.score(unit, report)


@contextlib.contextmanager
def _one_thread(config: UnitConfig) -> Iterator[None]:
    """Compute with one thread on a CPU: sums over several would depend on how many there are."""
    before = torch.get_num_threads()
    if config.plan.device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _collect(executor: ProcessPoolExecutor, units: Iterator[Unit], processes: int, report: Callable[[], None]) -> None:
    """Submit units while others are computed, so that few are in memory, and raise the first error."""
    pending: set[Future[None]] = set()
    more = True
    while pending or more:
        while more and len(pending) < 2 * processes:
            unit = next(units, None)
            more = unit is not None
            if unit is not None:
                pending.add(executor.submit(_score_unit, unit))
        done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        report()


class _Process:
    """The state of a process of the pool."""

    config: UnitConfig
    cells: MutableSequence[int]
    place: int
    scorer: UnitScorer | None = None


def _start(config: UnitConfig, cells: MutableSequence[int], places: multiprocessing.Queue[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _Process.config, _Process.cells, _Process.place = config, cells, places.get()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if config.plan.device == "cpu":
        torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this process with its parent, also if that is killed."""
    process = multiprocessing.parent_process()
    if process is not None:
        process.join()
    os._exit(1)


def _score_unit(unit: Unit) -> None:
    config, cells, place = _Process.config, _Process.cells, _Process.place
    tokens, running = 1 + _CELLS * place, 2 + _CELLS * place
    cells[running] = 1 + unit.number
    if _Process.scorer is None:
        _Process.scorer = UnitScorer(config, config.devices[place % len(config.devices)])

    def report(count: int) -> bool:
        cells[tokens] += count
        return not cells[0]

    _Process.scorer.score(unit, report)
    cells[running] = 0
