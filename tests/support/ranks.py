"""Pools of gloo ranks that live through a test session, because importing torch + deepspeed + megatron costs seconds.

`run_on_ranks(2, function, ...)` calls `function(...)` on two ranks of one torch.distributed world and returns what each
returned. The function makes its own topology with `pause_megatron.distributed.initialize` and closes it.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
_STARTUP_SECONDS = 180.0
_GRACE_SECONDS = 15.0
_pools: dict[int, Pool] = {}


def with_tests_path() -> dict[str, str]:
    """The variable with which `python -m support.NAME` finds this package and pause_megatron of this checkout."""
    folders = (str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


class RankError(AssertionError):
    """What went wrong on a rank, with that rank's traceback or stacks."""


def run_on_ranks(
    world_size: int, function: str | Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Call `function(*args, **kwargs)` on every rank of a pool.

    Args:
        world_size: number of ranks; a pool of each size is started when first asked for.
        function: "module:function", or a function at the top level of a file. Arguments and results are pickled.
        timeout: seconds until the ranks' stacks are printed and the pool is killed.

    Returns:
        One result per rank, in rank order.

    Raises:
        RankError: a rank raised, died or did not answer in time.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = Pool(world_size)
    return pool.call(_address(function), args, kwargs, timeout)


def close_pools() -> None:
    """Stop every pool."""
    while _pools:
        _pools.popitem()[1].kill()


class Pool:
    """The processes of one world size, and a pipe to each."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix=f"ranks-{world_size}-"))
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, str(self.folder), port, theirs), daemon=True, name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._collect(_STARTUP_SECONDS, "starting")

    def call(self, function: tuple[str, str], args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        """Send one call to every rank and wait for all answers."""
        message = pickle.dumps((function, args, kwargs))
        try:
            for pipe in self.pipes:
                pipe.send_bytes(message)
        except OSError:
            self.kill()
            raise RankError(f"a rank of the pool of {self.world_size} died between calls") from None
        return self._collect(timeout, function[1])

    def _collect(self, timeout: float, what: str) -> list[Any]:
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(answers) + len(errors) < self.world_size:
            left = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers and rank not in errors}
            # A rank that failed leaves the others waiting in a collective: give them a little time, no more.
            ready = wait(list(left), max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = self._stacks()
                self.kill()
                failures = "".join(errors.values())
                raise RankError(
                    f"{what}: ranks {sorted(left.values())} of {self.world_size} gave no answer in {timeout:.0f} s"
                    f"\n{failures}{stacks}"
                )
            for pipe in ready:
                rank = left[pipe]
                try:
                    fine, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    fine, value = False, f"the process died, exit code {self._exit_code(rank)}\n"
                if fine:
                    answers[rank] = value
                else:
                    errors[rank] = f"--- rank {rank} of {self.world_size}, {what}:\n{value}"
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if errors:
            if any("the process died" in text for text in errors.values()):
                self.kill()
            raise RankError("\n" + "".join(errors[rank] for rank in sorted(errors)))
        return [answers[rank] for rank in range(self.world_size)]

    def _exit_code(self, rank: int) -> int | None:
        self.processes[rank].join(5)
        return self.processes[rank].exitcode

    def _stacks(self) -> str:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        texts = []
        for rank in range(self.world_size):
            path = self.folder / f"stacks-{rank}"
            texts.append(f"--- stacks of rank {rank}:\n{path.read_text() if path.exists() else '(none)'}\n")
        return "".join(texts)

    def kill(self) -> None:
        """End the processes and forget the pool; the next call starts a fresh one."""
        if _pools.get(self.world_size) is self:
            del _pools[self.world_size]
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _address(function: str | Callable[..., Any]) -> tuple[str, str]:
    if isinstance(function, str):
        module, _, name = function.partition(":")
        return module, name
    return function.__code__.co_filename, function.__qualname__


def _resolve(address: tuple[str, str]) -> Callable[..., Any]:
    place, name = address
    if place.endswith(".py"):
        # Test files may share a name between folders; the path tells them apart.
        key = "on_ranks_" + str(Path(place).resolve()).replace(os.sep, "_").replace(".", "_")
        module = sys.modules.get(key)
        if module is None:
            spec = importlib.util.spec_from_file_location(key, place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            sys.path.insert(0, str(Path(place).resolve().parent))
            spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def _serve(rank: int, world_size: int, folder: str, port: int, pipe: Connection) -> None:
    stacks = open(Path(folder) / f"stacks-{rank}", "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    sys.path.insert(0, str(TESTS))
    try:
        _start(rank, world_size, port)
        pipe.send_bytes(pickle.dumps((True, None)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
    while True:
        try:
            address, args, kwargs = pickle.loads(pipe.recv_bytes())
        except (EOFError, KeyboardInterrupt):
            os._exit(0)
        try:
            answer = pickle.dumps((True, _resolve(address)(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
        gc.collect()  # an engine is a cycle that holds its process groups, and each of these three threads


def _start(rank: int, world_size: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    import pause_megatron.distributed  # noqa: F401 (megatron-core, once)

    torch.set_num_threads(1)
    _share_one_gloo_device()
    # Not a file store: that grows with every group that is made, and some tests limit the size of files.
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    import deepspeed  # noqa: F401 (once)


def _share_one_gloo_device() -> None:
    """Lets all groups of this process share one event loop.

    Each gloo group would have its own, which wakes a hundred times a second: the idle ranks of the pools would keep a
    core busy between them.
    """
    from torch.distributed import distributed_c10d

    gloo = distributed_c10d.ProcessGroupGloo
    device = gloo.create_device(interface="lo")

    class SharedDevice(gloo):
        # torch 2.15 passes enable_reconfigure too.
        def __init__(self, store: Any, rank: int, size: int, timeout: Any = None, **_: Any) -> None:
            options = gloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDevice
