"""A watchdog for hanging ranks: it prints the stacks of every rank, then ends all processes.

In a collective all ranks wait for the slowest, so a rank that hangs stops all of them: the watchdog of each fires.
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
from typing import Any, Protocol

import torch.distributed as dist

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import barrier
from pause_megatron.terminal.output import write_lines

EXIT_HUNG = 76
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


class _Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class HangWatch:
    """A watchdog that ends this process when `beat` is not called for a while. A context manager.

    A thread watches. It also writes a heartbeat of its process to the run's store, by which ranks that do not respond
    at all (stopped, swapped out, on a host that is down) are named. Where the thread cannot run because the
    interpreter hangs, faulthandler ends the process a little later, with exit code 1.

    Args:
        seconds: Longest time without a beat; more than the longest step, validation or save. 0: no watchdog.
        context: Process groups of this rank.
    """

    def __init__(self, seconds: float, context: ParallelContext) -> None:
        self._seconds, self._context = seconds, context
        self._between = min(seconds / 4, _MOST_SECONDS_BETWEEN_LOOKS)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: _Store | None = None
        self._last, self._what = time.monotonic(), "start"

    def __enter__(self) -> HangWatch:
        self._last, self._what = time.monotonic(), "start"
        if self._seconds:
            self._store = _separate_store()
            barrier()  # the store may live in rank 0's process, which ends at once where the run is complete
            self._write_heartbeat()
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
        """Reset the watchdog.

        Args:
            what: What the process has just done, for the message.
        """
        self._last, self._what = time.monotonic(), what
        if self._seconds:
            stream = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(self._seconds + 6 * self._between + 10, exit=True, file=stream)

    def _watch(self) -> None:
        while not self._done.wait(self._between):
            self._write_heartbeat()
            if time.monotonic() - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        # One write: ranks that share a standard error get here at the same moment.
        rank, host = self._context.rank, socket.gethostname()
        write_lines(
            f"[rank {rank} on {host}] nothing for {self._seconds:g} s (run.hang_seconds), last: {self._what}. The "
            f"stacks of its threads, then exit code {EXIT_HUNG}:\n{_stacks()}"
        )
        time.sleep(2 * self._between)  # an exit breaks connections: the other ranks print their stacks first
        naming = threading.Thread(target=self._name_silent_ranks, daemon=True)  # the store may hang, too
        naming.start()
        naming.join(2 * self._between)
        os._exit(EXIT_HUNG)

    def _write_heartbeat(self) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):  # the collectives report a lost store
                self._store.set(f"alive/{self._context.rank}", f"{time.time()} {socket.gethostname()}")

    def _name_silent_ranks(self) -> None:
        if self._store is None:
            return
        self._write_heartbeat()
        silent = []
        for rank in range(self._context.world_size):
            with contextlib.suppress(Exception):
                seen, host = self._store.get(f"alive/{rank}").decode().split()
                age = time.time() - float(seen)
                if age > self._seconds:  # ranks whose watchdog runs write more often
                    silent.append(f"{rank} (on {host}, last seen {age:.0f} s ago)")
        if silent:
            print(f"ranks that do not answer at all: {', '.join(silent)}", file=sys.__stderr__, flush=True)


def _stacks() -> str:
    """Return the stacks of all threads."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def collective_timeout(config: ResolvedConfig) -> timedelta:
    """Return the timeout of collectives: longer than the watchdog's, whose message says more than a NCCL timeout.

    Args:
        config: Configuration of the run.
    """
    return timedelta(seconds=max(600, 2 * config.run.hang_seconds))


def _separate_store() -> _Store | None:
    """Return a separate connection to the run's store, for another thread; None in a process that is alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    try:
        default: Any = dist.distributed_c10d._get_default_store()
        store: _Store = dist.PrefixStore("hang_watch", default.clone())
        return store
    except (AttributeError, RuntimeError):  # a store that cannot be shared between threads
        return None
