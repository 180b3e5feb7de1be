"""Kills in saves, ranks that are late, files damaged: R1, R2 and R3."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults.results import Result
from support.file_calls import Ambush, Counting, Delay, Pick, writing
from support.forked_ranks import RANKS, fork
from support.saving import Saving, kill, named_by, outcome_of, start

CLEAN_SAVES = 6
SECONDS_HELD = 0.5
DAMAGES = {
    "flip": "R3: one bit of a state file flipped",
    "truncate": "R3: a file cut in half",
    "delete": "R3: a file deleted",
    "swap": "R3: two files swapped: all pairs of a checkpoint, and each with the same file of an older one",
}


def calls_of_a_save(system: str, folder: Path) -> list[int]:
    """File calls of a save by rank, once older checkpoints are there to be deleted; leaves checkpoints behind."""
    counts: list[float] = [0.0] * RANKS
    start_over(system, folder)
    for rank in range(RANKS):
        for saves, sign in ((1, -1), (1 + CLEAN_SAVES, 1)):
            counting = Counting(by(rank))
            for process in start(system, folder, saves=saves, decide=counting):
                process.join()
            counts[rank] += sign * counting.count / CLEAN_SAVES
    return [round(count) for count in counts]


def by(rank: int) -> Pick:
    """The calls of one rank that write."""
    return lambda who, call: who == rank and call.writes


def start_over(system: str, folder: Path) -> None:
    """A folder with three complete checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for process in start(system, folder, saves=3):
        process.join()


def restart(system: str, folder: Path, decide=None) -> tuple[str, list]:
    """Return what a start finds, and its processes; a folder that cannot be resumed is restarted."""
    begun = any(folder.iterdir())
    processes = start(system, folder, decide=decide)
    outcome = outcome_of(folder, processes)
    if outcome == "fresh" and begun:
        outcome = "lost: began anew"
    if outcome != "resumed":
        kill(processes, [0.0] * RANKS)
        start_over(system, folder)
        processes = start(system, folder, decide=decide)
        outcome_of(folder, processes)
    return outcome, processes


def kills(system: str, count: int) -> Result:
    """R1. What a restart finds after each kill."""
    rng, found = random.Random(0), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        calls = sum(calls_of_a_save(system, folder))
        ambush = Ambush(writing, rng.randrange(2 * calls))
        _, processes = restart(system, folder, ambush)
        while sum(found.values()) < count:
            if not ambush.reached.wait(120):
                raise RuntimeError(f"{system}: the save did not come in 120 s; see {folder.parent / 'log.txt'}")
            order = rng.sample(processes, RANKS)
            # Every third time only one rank is killed, and the other continues as far as it can.
            alone = rng.random() < 1 / 3
            timer = threading.Timer(0.01, ambush.release)
            if alone:
                timer.start()
            kill(order, [rng.uniform(0.02, 0.3) if alone else 0.0, 0.0])
            ambush.release()
            ambush = Ambush(writing, rng.randrange(2 * calls))
            outcome, processes = restart(system, folder, ambush)
            found[outcome] += 1
        kill(processes, [0.0] * RANKS)
        ambush.release()
    title = "R1: kill -9 before a random file call of a save, restart"
    return Result({title: found}, note=f"{calls} file calls a save")


def delays(system: str, count: int) -> Result:
    """R2. What a restart finds when a rank was late, at `count` calls at most of a save, of every rank."""
    found: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        calls = calls_of_a_save(system, folder)
        late = [(rank, call) for rank in range(RANKS) for call in range(calls[rank])][:count]
        delay, processes = None, []
        for rank, call in [*late, (0, 10**6)]:
            previous, delay = delay, Delay(by(rank), call)
            outcome, processes = restart(system, folder, delay)
            if previous is not None:
                found[outcome] += 1
            if (rank, call) == (0, 10**6):
                break
            if not delay.reached.wait(120):
                raise RuntimeError(f"{system}: call {call} of rank {rank} did not come in 120 s")
            before, end = named_by(folder / "latest"), time.monotonic() + SECONDS_HELD
            while time.monotonic() < end and named_by(folder / "latest") in (before, "", None):
                time.sleep(0.001)
            kill(processes, [0.0] * RANKS)
            delay.release()
        kill(processes, [0.0] * RANKS)
    title = "R2: one rank late at each of its file calls of a save, all killed meanwhile, restart"
    return Result({title: found}, note=f"{calls[0]} file calls of rank 0 and {calls[1]} of rank 1, each held once")


def damage(system: str, count: int) -> Result:
    """R3, on one rank: one file of the newest checkpoint altered, or two swapped; restored; mended."""
    with tempfile.TemporaryDirectory() as name:
        output, log = Path(name, "found.json"), Path(name, "log.txt")
        for process in fork(_damage, (system, count, output), log, ranks=1):
            process.join()
        if not output.exists():
            raise RuntimeError(f"{system}: damaged files were not tried to the end\n{log.read_text()[-4000:]}")
        found = json.loads(output.read_text())
    return Result({DAMAGES[kind]: Counter(counts) for kind, counts in found.items()})


def _damage(system: str, flips: int, output: Path) -> None:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    rng, found = random.Random(1), {kind: Counter() for kind in DAMAGES}
    with tempfile.TemporaryDirectory() as name, initialize(ParallelSection()) as topology:
        saving = Saving(system, Path(name), topology)
        for step in (1, 2, 3):
            saving.fill(step)
            saving.save(step)
        newest, older = (saving.path(step) for step in (3, 2))
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        sizes = [path.stat().st_size for path in files]
        damages = [("flip", [path]) for path in rng.choices(files, sizes, k=flips)]
        damages += [(kind, [path]) for kind in ("truncate", "delete") for path in files]
        damages += [("swap", list(pair)) for pair in itertools.combinations(files, 2)]
        damages += [("swap", [path, older / path.relative_to(newest)]) for path in files]
        for kind, paths in damages:
            whole = [path.read_bytes() for path in paths]
            alter(kind, paths, rng)
            outcome, step = saving.restore()
            said = " ".join(saving.complaints)
            named = any(path.name in said for path in paths)  # the names are each the only ones in their folder
            if outcome == "resumed":
                older_taken = "older checkpoint instead, " + ("file named" if named else "another file named")
                outcome = older_taken if step < 3 else "not seen, no element differs"
            elif outcome == "wrong":
                outcome = "not seen, state is wrong"
            found[kind][outcome] += 1
            for path, content in zip(paths, whole, strict=True):
                path.write_bytes(content)
    output.write_text(json.dumps(found))


def alter(kind: str, paths: list[Path], rng: random.Random) -> None:
    """One bit flipped, the second half cut off, deleted; or two swapped."""
    whole = [path.read_bytes() for path in paths]
    content, place = bytearray(whole[0]), rng.randrange(len(whole[0]))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
        paths[0].write_bytes(content)
    elif kind == "truncate":
        paths[0].write_bytes(content[: len(content) // 2])
    elif kind == "delete":
        paths[0].unlink()
    else:
        paths[0].write_bytes(whole[1])
        paths[1].write_bytes(whole[0])
