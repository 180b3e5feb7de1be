"""A rank that hangs: found, its stacks and everybody else's printed, and every process ended.

In a collective operation all ranks wait for the slowest, so when one hangs none goes on: every rank's watch fires.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import barrier
from pause_megatron.terminal.output import write_lines

EXIT_HUNG = 76
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


class HangWatch:
    """Ends this process when `beat` is not called for a while. Use as a context.

    A thread watches; it also leaves a sign of life of its process in the run's store, by which the ranks that do not
    answer at all (stopped, swapped out, on a machine that is gone) are named. Should the thread not get to run because
    the interpreter hangs, faulthandler ends the process a little later, with exit code 1.

    Args:
        seconds: without a beat; more than the longest step, validation or save. 0: no watch
        context: this rank's place
    """

    def __init__(self, seconds: float, context: ParallelContext) -> None:
        self._seconds, self._context = seconds, context
        self._between = min(seconds / 4, _MOST_SECONDS_BETWEEN_LOOKS)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._store = None

    def __enter__(self) -> HangWatch:
        self._last, self._what = time.monotonic(), "start"
        if self._seconds:
            self._store = _store()
            barrier()  # the store may live in rank 0's process, which ends at once where the run is complete
            self._sign_of_life()
            self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
            self._thread.start()
            self.beat("start")
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str) -> None:
        """The program goes on; `what` says with what."""
        self._last, self._what = time.monotonic(), what
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds + 6 * self._between + 10, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        while not self._done.wait(self._between):
            self._sign_of_life()
            if time.monotonic() - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        # Ranks that share a standard error come here at the same moment.
        rank, host = self._context.rank, socket.gethostname()
        write_lines(
            f"[rank {rank} on {host}] nothing for {self._seconds:g} s (run.hang_seconds), last: {self._what}. The "
            f"stacks of its threads, then exit code {EXIT_HUNG}:\n{_stacks()}"
        )
        time.sleep(2 * self._between)  # an end breaks connections: the others print theirs first
        asking = threading.Thread(target=self._name_the_silent, daemon=True)  # the store may be what hangs
        asking.start()
        asking.join(2 * self._between)
        os._exit(EXIT_HUNG)

    def _sign_of_life(self) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):  # a lost store is told by the collective operations
                self._store.set(f"alive/{self._context.rank}", f"{time.time()} {socket.gethostname()}")

    def _name_the_silent(self) -> None:
        if self._store is None:
            return
        self._sign_of_life()
        silent = []
        for rank in range(self._context.world_size):
            with contextlib.suppress(Exception):
                seen, host = self._store.get(f"alive/{rank}").decode().split()
                age = time.time() - float(seen)
                if age > self._seconds:  # those that look on and print leave signs more often
                    silent.append(f"{rank} (on {host}, last seen {age:.0f} s ago)")
        if silent:
            print(f"ranks that do not answer at all: {', '.join(silent)}", file=sys.__stderr__, flush=True)


def _stacks() -> str:
    """What all threads are at."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def patience(config: ResolvedConfig) -> timedelta:
    """How long a collective operation may take: longer than the watch waits, which says more than a time-out does."""
    return timedelta(seconds=max(600, 2 * config.run.hang_seconds))


def _store() -> dist.Store | None:
    """A connection of its own to the run's store, for use by another thread; None for a process that is alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    try:
        return dist.PrefixStore("hang_watch", dist.distributed_c10d._get_default_store().clone())
    except (AttributeError, RuntimeError):  # a store that cannot be shared between threads
        return None
