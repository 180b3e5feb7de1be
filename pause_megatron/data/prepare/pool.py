"""The worker processes of `prepare`: start them, watch their progress, stop them when something is wrong."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Literal

from pause_megatron.data.prepare.shard import Counters, ShardOutcome, ShardTask, run_task, start_worker
from pause_megatron.data.text.sources import ReadOptions
from pause_megatron.data.tokenizer.fast.encoders import EncoderName
from pause_megatron.errors import DataError

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Progress:
    """Where a preparation stands; sums over all shards, those of earlier runs included.

    Attributes:
        phase: "read" while shards are read, "join" while their parts are joined.
        done_bytes: bytes of the sources as stored that were read (of the parts that were joined).
        total_bytes: of all sources (parts); None where a data set does not say.
    """

    phase: Literal["read", "join"]
    documents: int
    tokens: int
    text_bytes: int
    malformed: int
    done_bytes: int
    total_bytes: int | None
    shards_done: int
    shards: int


def run_tasks(
    tasks: list[ShardTask],
    finished: list[ShardOutcome],
    folder: Path,
    options: ReadOptions,
    encoder: EncoderName,
    *,
    workers: int,
    hopeless: Callable[[Progress], bool],
    total_bytes: int | None,
    on_progress: Callable[[Progress], None],
) -> list[ShardOutcome]:
    """Prepare shards, each in one process.

    Args:
        tasks: shards to prepare.
        finished: outcomes of earlier runs, for the sums.
        folder: PREFIX.parts/, with the tokenizer in it.
        options: how shards are read.
        encoder: "library" or "gigatoken".
        workers: processes; 1 works in a thread of this process.
        hopeless: whether to stop all workers early; the caller says why.
        total_bytes: of all sources, where known.
        on_progress: called every POLL_SECONDS.

    Returns:
        An outcome for each task that was begun, in no particular order.

    Raises:
        DataError: the first one (by shard) that a worker met, after all workers have stopped; a worker that was killed.
    """
    if not tasks:
        return []
    shards = len(tasks) + len(finished)
    context = multiprocessing.get_context("spawn")
    size = Counters.size(shards)
    counters = Counters(context.Array("q", size, lock=False) if workers > 1 else [0] * size)
    for outcome in finished:
        _count_finished(counters, outcome)
    executor = _executor(min(workers, len(tasks)), context, (folder, options, encoder, counters.cells))

    def report(done: int) -> None:
        progress = _read_progress(counters, total_bytes, len(finished) + done, shards)
        on_progress(progress)
        if hopeless(progress):
            counters.stop()

    report(0)
    try:
        return _collect({executor.submit(run_task, task): task.number for task in tasks}, counters, report)
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed (out of memory? try fewer --workers); finished shards are kept: run the same "
            "command again"
        ) from None
    finally:
        counters.stop()
        executor.shutdown(wait=True, cancel_futures=True)


def _read_progress(counters: Counters, total_bytes: int | None, shards_done: int, shards: int) -> Progress:
    return Progress(
        phase="read",
        documents=counters.sum("documents"),
        tokens=counters.sum("tokens"),
        text_bytes=counters.sum("text_bytes"),
        malformed=counters.sum("malformed"),
        done_bytes=counters.sum("read_bytes"),
        total_bytes=total_bytes,
        shards_done=shards_done,
        shards=shards,
    )


def _count_finished(counters: Counters, outcome: ShardOutcome) -> None:
    source = outcome.part.source
    sums = (source.counts.documents, source.counts.tokens, source.counts.text_bytes)
    counters.set(outcome.number, (*sums, source.identity.get("bytes") or 0, outcome.malformed.total))


def _executor(workers: int, context: SpawnContext, state: tuple) -> Executor:
    # One worker needs no process, so a script that calls `prepare(workers=1)` needs no `if __name__ == "__main__"`.
    if workers > 1:
        return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(*state, True))
    return ThreadPoolExecutor(1, initializer=start_worker, initargs=(*state, False))


def _collect(futures: dict[Future, int], counters: Counters, report: Callable[[int], None]) -> list[ShardOutcome]:
    outcomes: list[ShardOutcome] = []
    errors: dict[int, Exception] = {}
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            if future.cancelled():
                continue
            error = future.exception()
            if error is not None:
                errors[futures[future]] = error
                counters.stop()
            else:
                outcomes.append(future.result())
        if counters.stopped:
            # Those not begun are dropped; those at work stop after their batch, and their counts are still told.
            pending -= {future for future in pending if future.cancel()}
        report(len(outcomes))
    if errors:
        raise errors[min(errors)]
    return outcomes
