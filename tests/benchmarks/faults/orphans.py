"""R16: kill -9 of only torchrun, at random moments after its start. Do its ranks survive?"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.faults.results import Result
from benchmarks.faults.runs import PLAIN_SCRIPT, arguments, prepared, processes_of, torchrun

SECONDS = 10.0
TITLE = f"R16: kill -9 of torchrun at a random moment, {SECONDS:.0f} s later"
STEPS = 10**6


def orphans(system: str, count: int) -> Result:
    """R16. The moments are drawn from the start of torchrun to some steps."""
    rng, result, waits = random.Random(0), Result(), []
    found: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as name:
        corpus, seconds = prepared(Path(name)), _seconds_to_a_step(system, Path(name))
        for number in range(count):
            folder = Path(name, f"run-{number}")
            process = _start(system, corpus, folder)
            time.sleep(rng.uniform(0.5, 1.2 * seconds))
            begun, starting = bool(_lines(folder)), process.poll() is None
            process.kill()
            process.wait()
            if not starting:
                raise RuntimeError(f"{system}: it ended by itself\n{(folder.parent / 'log.txt').read_text()[-3000:]}")
            # Meanwhile the next one starts.
            waits.append(threading.Timer(SECONDS, _look, (found, number, folder, begun)))
            waits[-1].start()
        for wait in waits:
            wait.join()
    for outcome in found.values():
        result.count(TITLE, outcome)
    result.note = f"a first step {seconds:.0f} s after the start"
    return result


def _start(system: str, corpus: str, folder: Path) -> subprocess.Popen:
    folder.mkdir()
    if system == "deepspeed":
        settings = folder / "settings.json"
        settings.write_text(json.dumps({"folder": str(folder), "steps": STEPS, "save_every": STEPS}))
        words = [str(PLAIN_SCRIPT), str(settings)]
    else:
        keys = {"train__steps": STEPS, "checkpoint__every": 0, "log__tensorboard": "false"}
        words = ["-m", "pause_megatron", *arguments(corpus, folder, **keys)]
    with open(folder.parent / "log.txt", "ab") as log:
        return subprocess.Popen(torchrun(words), stdout=log, stderr=log, start_new_session=True)


def _lines(folder: Path) -> bytes:
    path = folder / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def _seconds_to_a_step(system: str, folder: Path) -> float:
    begun, run = time.monotonic(), folder / "clocked"
    process = _start(system, str(folder / "corpus"), run)
    try:
        while not _lines(run):
            if process.poll() is not None or time.monotonic() > begun + 120:
                raise RuntimeError(f"{system}: no step\n{(folder / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - begun
    finally:
        process.kill()
        process.wait()
        _end(processes_of(run))


def _end(processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _look(found: dict[int, str], number: int, folder: Path, begun: bool) -> None:
    alive, when = processes_of(folder), "in its steps" if begun else "before its first step"
    outcome = "no rank is alive" if not alive else f"**{len(alive)} ranks are alive**"
    if alive and (folder / ".lock").exists():
        with open(folder / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                outcome += ", the run folder is theirs"
    found[number] = f"killed {when}: {outcome}"
    _end(alive)
    print(f"{number}: {found[number]}", file=sys.stderr)
