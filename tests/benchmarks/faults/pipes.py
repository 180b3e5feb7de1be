"""R16: what a run writes to is gone, or its terminal is: does it end with all its steps, or a checkpoint of them?"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.faults.results import Result
from benchmarks.faults.runs import arguments, prepared, run_ours, run_plain, saved_step, steps_done, wait_for_end
from support.file_calls import Decide, FileCall
from support.forked_ranks import fork

STEPS, SAVE_EVERY, SECONDS = 60, 50, 120.0
NO_ROOM = {"no room for metrics.jsonl": "metrics.jsonl", "no room for TensorBoard's files": "tensorboard"}
Blow = Callable[[BaseProcess, Path, int], None]


def _reader_gone(process: BaseProcess, folder: Path, reader: int) -> None:
    os.close(reader)


def _interrupted_without_reader(process: BaseProcess, folder: Path, reader: int) -> None:
    os.close(reader)
    os.kill(process.pid, signal.SIGINT)


def _hang_up(process: BaseProcess, folder: Path, reader: int) -> None:
    os.kill(process.pid, signal.SIGHUP)
    os.close(reader)


def _folder_gone(process: BaseProcess, folder: Path, reader: int) -> None:
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _metrics_gone(process: BaseProcess, folder: Path, reader: int) -> None:
    (folder / "metrics.jsonl").unlink(missing_ok=True)


def _nothing(process: BaseProcess, folder: Path, reader: int) -> None:
    """The fault is there from the start."""


BLOWS: dict[str, Blow] = {
    "the reader of a pipe ends": _reader_gone,
    "Ctrl-C in a pipeline whose reader is gone": _interrupted_without_reader,
    "stdout and stderr on a full device": _nothing,
    "the folder of TensorBoard is deleted": _folder_gone,
    "metrics.jsonl is deleted": _metrics_gone,
    "no room for metrics.jsonl": _nothing,
    "no room for TensorBoard's files": _nothing,
    "SIGHUP, and the terminal is gone": _hang_up,
}


def pipes(system: str, count: int) -> Result:
    """R16, one rank each: every blow `count` times, at random steps."""
    result = Result(note=f"{STEPS} steps, a save every {SAVE_EVERY}")
    with tempfile.TemporaryDirectory() as name:
        corpus = prepared(Path(name))
        for what, blow in BLOWS.items():
            for number in range(count):
                folder = Path(name, f"{number}-{len(result.tables)}-{what[:12]}".replace(" ", "-"))
                result.count(f"R16: {what}", _one(system, corpus, folder, what, blow, random.Random(number)))
    return result


def _one(system: str, corpus: str, folder: Path, what: str, blow: Blow, rng: random.Random) -> str:
    folder.mkdir()
    wanted = rng.randrange(3, STEPS - 20)
    full = _full(folder / NO_ROOM[what], wanted) if what in NO_ROOM else None
    reader = _pipe(folder)
    output = Path("/dev/full") if what == "stdout and stderr on a full device" else folder / "pipe"
    if system == "deepspeed":
        settings = {"folder": str(folder), "steps": STEPS, "save_every": SAVE_EVERY, "hidden": 64}
        (process,) = fork(run_plain, ([settings],), output, ranks=1, folder=folder, decide=full)
    else:
        keys = {"train__steps": STEPS, "checkpoint__every": SAVE_EVERY}
        (process,) = fork(run_ours, ([arguments(corpus, folder, **keys)],), output, ranks=1, folder=folder, decide=full)
    end = time.monotonic() + SECONDS
    while blow is not _nothing and steps_done(folder) < wanted and process.is_alive() and time.monotonic() < end:
        _drain(reader)
        time.sleep(0.005)
    before = steps_done(folder)
    blow(process, folder, reader)
    while process.is_alive() and time.monotonic() < end:
        _drain(reader)
        process.join(0.02)
    ended = wait_for_end([process], 0.1)
    if not ended:
        process.kill()
        process.join()
    _close(reader)
    saved, done = saved_step(folder), max(before, steps_done(folder))
    print(
        f"{system}, {what}: exit {process.exitcode}, step {before} before, {done} done, checkpoint {saved}",
        file=sys.stderr,
    )
    if not ended:
        return "**hangs**"
    if saved == STEPS:
        return "all steps done and saved" if process.exitcode == 0 else "all steps done and saved, exit code not 0"
    if saved >= done > 0:
        return f"ends early, its steps are saved, exit code {process.exitcode}"
    return "**lost**: ends early, and its last steps are not saved"


def _full(place: Path, after: int) -> Decide:
    """No room below `place`, or for it, once so many writes have had it."""
    writes = itertools.count()

    def decide(rank: int, call: FileCall) -> int:
        below = call.name.endswith(("write", "write64", "writev")) and call.path.is_relative_to(place)
        return errno.ENOSPC if below and next(writes) >= after else 0

    return decide


def _pipe(folder: Path) -> int:
    """A named pipe and its reading end, for a process that opens it by name."""
    os.mkfifo(folder / "pipe")
    return os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)


def _drain(reader: int) -> None:
    try:
        while os.read(reader, 65536):
            pass
    except OSError:
        return


def _close(reader: int) -> None:
    try:
        os.close(reader)
    except OSError:
        return
