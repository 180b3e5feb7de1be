"""The worker pool of `prepare`: start, progress reports, and stop on errors."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from typing import Literal

from pause_megatron.data.prepare.counters import ShardSums, SharedCounters
from pause_megatron.data.prepare.shard import PartRecord, ShardOutcome, ShardTask, WorkerConfig, run_task, start_worker
from pause_megatron.errors import DataError

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class PrepareProgress:
    """The progress of a preparation, summed over all shards, those of earlier runs included.

    Attributes:
        phase: "read" while shards are read, "join" while their parts are joined.
        documents: Number of documents.
        tokens: Number of token ids, EODs included.
        text_bytes: Size of the text as UTF-8.
        malformed: Number of malformed lines.
        done_bytes: Bytes read of the sources as stored, or bytes of joined parts.
        total_bytes: Size of all sources or parts; None where it is not known.
        shards_done: Number of finished shards, or of joined parts.
        shards: Number of shards.
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
    tasks: Sequence[ShardTask],
    finished: Mapping[int, PartRecord],
    config: WorkerConfig,
    *,
    workers: int,
    total_bytes: int | None,
    on_progress: Callable[[PrepareProgress], bool],
) -> list[ShardOutcome]:
    """Prepare shards, each in one process.

    Args:
        tasks: Shards to prepare.
        finished: Parts of earlier runs by number, which the sums include.
        config: Settings of the workers.
        workers: Number of processes; 1 uses a thread of this process.
        total_bytes: Size of all sources; None where it is not known.
        on_progress: Called every `POLL_SECONDS`; all workers stop once it returns False.

    Returns:
        An outcome for each task that was begun, in no particular order.

    Raises:
        DataError: The error of the first shard that failed, after all workers have stopped; or a worker was killed.
    """
    if not tasks:
        return []
    shards = len(tasks) + len(finished)
    context = multiprocessing.get_context("spawn")
    size = SharedCounters.size(shards)
    counters = SharedCounters(context.Array("q", size, lock=False) if workers > 1 else [0] * size)
    for number, part in finished.items():
        counters.set(number, _sums_of(part))
    executor = _executor(min(workers, len(tasks)), context, config, counters.cells)

    def report(done: int) -> None:
        sums = counters.total()
        progress = PrepareProgress(
            phase="read",
            documents=sums.documents,
            tokens=sums.tokens,
            text_bytes=sums.text_bytes,
            malformed=sums.malformed,
            done_bytes=sums.read_bytes,
            total_bytes=total_bytes,
            shards_done=len(finished) + done,
            shards=shards,
        )
        if not on_progress(progress):
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


def _sums_of(part: PartRecord) -> ShardSums:
    counts, size = part.source.counts, part.source.identity.get("bytes")
    return ShardSums(
        documents=counts.documents,
        tokens=counts.tokens,
        text_bytes=counts.text_bytes,
        read_bytes=size if isinstance(size, int) else 0,
        malformed=sum(part.malformed.counts.values()),
    )


def _executor(workers: int, context: SpawnContext, config: WorkerConfig, cells: MutableSequence[int]) -> Executor:
    # A single worker is a thread, so a script that calls `prepare(workers=1)` needs no `if __name__ == "__main__"`.
    if workers > 1:
        return ProcessPoolExecutor(
            workers, mp_context=context, initializer=start_worker, initargs=(config, cells, True)
        )
    return ThreadPoolExecutor(1, initializer=start_worker, initargs=(config, cells, False))


def _collect(
    futures: Mapping[Future[ShardOutcome], int], counters: SharedCounters, report: Callable[[int], None]
) -> list[ShardOutcome]:
    outcomes: list[ShardOutcome] = []
    errors: dict[int, BaseException] = {}
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
            # Tasks not begun are cancelled; running ones stop after their batch, and their sums are still reported.
            pending -= {future for future in pending if future.cancel()}
        report(len(outcomes))
    if errors:
        raise errors[min(errors)]
    return outcomes
