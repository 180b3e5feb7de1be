"""One job at a time in a run folder, and no lock that outlives its job.

Rank 0 holds a file lock, which goes with its process, and keeps a small file fresh that says whose it is. Where the
lock is seen by one machine only (Lustre with `localflock`, file systems without locks), the file decides: it changes as
long as its job lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.durable import only_writer
from pause_megatron.errors import ConfigError, DataError

BEAT_SECONDS = 10.0
BEATS_UNTIL_GONE = 4


@contextlib.contextmanager
def own_run(folder: Path, context: ParallelContext, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """While the body runs, no other job may run in the folder. Every rank calls this.

    Args:
        folder: of the run; created
        context: this rank's place
        beat_seconds: between two signs of life; an owner on another machine is gone after `BEATS_UNTIL_GONE` of them

    Raises:
        ConfigError: another job runs there; it is named. Raised on every rank.
    """
    with contextlib.ExitStack() as closing:
        refusal = _take(folder, closing, beat_seconds) if context.rank == 0 else None
        if refusal := gather_objects(refusal)[0]:
            raise ConfigError(refusal)
        yield


def _take(folder: Path, closing: contextlib.ExitStack, beat_seconds: float) -> str | None:
    """Becomes the owner until `closing` is closed, or says who is."""
    owner = folder / ".owner.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        closing.enter_context(only_writer(folder / ".lock", f"the run {folder}"))
        if _alive_elsewhere(owner, beat_seconds):
            return _refusal(folder, owner)
        closing.enter_context(_beating(owner, beat_seconds))
    except DataError:
        return _refusal(folder, owner)
    except OSError as error:
        return f"run.dir={folder}: expected a folder to write to: {error}"
    return None


def _alive_elsewhere(owner: Path, beat_seconds: float) -> bool:
    """Whether a job on another machine goes on writing the file. (On this machine the lock has decided.)"""
    first = _read(owner)
    if first is None or first.get("host") == socket.gethostname():
        return False
    seconds, silent = BEATS_UNTIL_GONE * beat_seconds, _age(owner)
    if silent <= seconds:
        _say(f"{owner}: left by {_name(first)}; waiting {seconds:.0f} s for a sign of life")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(beat_seconds / 4)
            if _read(owner) != first:
                return _read(owner) is not None
        silent = _age(owner)
    _say(f"{owner}: {_name(first)} gave no sign of life for {silent:.0f} s: taken over")
    return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _age(path: Path) -> float:
    """Seconds since a file was written, by the clock of the file system: clocks of machines differ."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _beating(owner: Path, beat_seconds: float) -> Iterator[None]:
    """Keeps the file fresh from a thread; removes it at the end."""
    record = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(beat_seconds):
            count += 1
            with contextlib.suppress(OSError):  # a full disk is the next save's to report
                _write(owner, {**record, "beat": count})

    _write(owner, {**record, "beat": 0})
    thread = threading.Thread(target=beat, name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        owner.unlink(missing_ok=True)


def _write(owner: Path, record: dict[str, Any]) -> None:
    partial = owner.with_name(f"{owner.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(record), encoding="utf-8")
    os.replace(partial, owner)


def _read(owner: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(owner.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _refusal(folder: Path, owner: Path) -> str:
    record = _read(owner)
    holder = f"held by {_name(record)}" if record else "held by another process"
    return f"run.dir={folder}: expected a folder that no other job runs in, {holder}; stop it, or give another run.dir"


def _name(record: dict[str, Any]) -> str:
    job = f", SLURM job {record['job']}" if record.get("job") else ""
    return f"process {record.get('process')} on {record.get('host')}{job}, since {record.get('since')}"
