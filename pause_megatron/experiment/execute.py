"""Runs one cell: its verb in a process of its own, its log, its ledger, and done.json when all is there. No torch."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import INPUT, OUTPUT, PRODUCT, VERSION, read_json, write_json
from pause_megatron.experiment.ledger import ledger_of
from pause_megatron.files.durable import only_writer
from pause_megatron.files.locks import Backoff
from pause_megatron.host import launcher

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # as the training verbs: asked to stop, the same command goes on

# (program, ranks) -> the command line that starts the program on so many ranks.
Launch = Callable[[Sequence[str], int], list[str]]


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        code: EXIT_DONE, EXIT_STOPPED, or what the verb said.
        seconds: of this attempt.
        already: it was done before, and nothing ran.
    """

    code: int
    seconds: float = 0.0
    already: bool = False


class Stop:
    """Asks the verbs that run to end; they save and say EXIT_STOPPED. Shared by the threads of a local run."""

    def __init__(self) -> None:
        self.asked = False
        self._running: set[subprocess.Popen] = set()

    def ask(self) -> None:
        """From now on nothing starts; what runs is sent SIGTERM."""
        self.asked = True
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def watching(self, process: subprocess.Popen):
        """While the body runs, the process is among those that are stopped."""
        self._running.add(process)
        if self.asked:  # between its start and now
            self.ask()
        try:
            yield
        finally:
            self._running.discard(process)


def alone_or_deepspeed(program: Sequence[str], ranks: int, gpus: Sequence[str] = ()) -> list[str]:
    """One rank alone; several under DeepSpeed's launcher, on a port of their own.

    Args:
        gpus: one for each rank, as CUDA_VISIBLE_DEVICES names them; (): whichever the program takes.
    """
    if ranks == 1:
        variables = ["env", f"CUDA_VISIBLE_DEVICES={gpus[0]}"] if gpus else []
        return [*variables, sys.executable, "-m", *program]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --num_gpus takes the first ones, whatever CUDA_VISIBLE_DEVICES says.
    wanted = ["--include", f"localhost:{','.join(gpus)}"] if gpus else ["--num_gpus", str(ranks)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *wanted, "--master_port", str(port)]
    return [*launcher, "--module", *program]


def under_srun(program: Sequence[str], ranks: int) -> list[str]:
    """In a SLURM job: several ranks as tasks of a step."""
    python = [sys.executable, "-m", *program]
    return python if ranks == 1 else ["srun", "--ntasks", str(ranks), "--kill-on-bad-exit=1", *python]


def is_done(folder: Path, fingerprint: str) -> bool:
    """Whether done.json says that this very cell is complete."""
    record = read_json(folder / "done.json", missing_ok=True)
    return record is not None and record["fingerprint"] == fingerprint


def run_cell(folder: Path, launch: Launch, stop: Stop, say: Callable[[str], None] = print) -> Outcome:
    """Run the cell that FOLDER/cell.json describes, unless it is done.

    While the verb runs, it holds the cell's lock as well: should this process be killed, the verb ends soon after it,
    and the next attempt waits for that.

    Args:
        launch: how a program is started on several ranks.
        stop: says when to end early.
        say: told what is worth knowing.

    Raises:
        DataError: cell.json cannot be used, or the verb said that all is well and left no product.
    """
    cell = read_json(folder / "cell.json")
    with contextlib.ExitStack() as closing:
        lock = _wait_for_lock(folder, closing, stop, say)
        if is_done(folder, cell["fingerprint"]):
            return Outcome(EXIT_DONE, already=True)
        if stop.asked or lock is None:
            return Outcome(EXIT_STOPPED)
        (folder / "failed.json").unlink(missing_ok=True)
        begun = time.time()
        attempts = [*_attempts(folder), {"begun": begun, "seconds": None}]
        write_json(folder / "attempts.json", {"version": VERSION, "attempts": attempts})
        code = _run_verb(folder, cell, launch, stop, lock)
        attempts[-1]["seconds"] = seconds = time.time() - begun
        write_json(folder / "attempts.json", {"version": VERSION, "attempts": attempts})
        failure = {"version": VERSION, "code": code, "fingerprint": cell["fingerprint"]}
        if code == EXIT_DONE:
            try:
                _finish(folder, cell, attempts)
            except DataError:
                write_json(folder / "failed.json", failure)
                raise
        elif code != EXIT_STOPPED and not stop.asked:
            write_json(folder / "failed.json", failure)
        return Outcome(EXIT_STOPPED if stop.asked and code else code, seconds)


def arguments_of(folder: Path, cell: dict[str, Any]) -> list[str]:
    """The verb's arguments with folders in place."""
    places = {OUTPUT: str(folder / PRODUCT[cell["verb"]])}
    if cell["input"]:
        input_folder = folder.parent / cell["input"]
        places[INPUT] = str(input_folder / PRODUCT[read_json(input_folder / "cell.json")["verb"]])
    found = []
    for argument in cell["arguments"]:
        for mark, place in places.items():
            argument = argument.replace(mark, place)
        found.append(argument)
    return found


def last_lines(folder: Path, count: int = 15) -> str:
    """The end of a cell's log."""
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(f"    {line}" for line in lines[-count:])


def _wait_for_lock(folder: Path, closing: contextlib.ExitStack, stop: Stop, say: Callable[[str], None]) -> int | None:
    """Take the cell's lock, or None when asked to stop while another process holds it."""
    said, backoff = False, Backoff(0.5, 0.5)
    while not stop.asked:
        try:
            return closing.enter_context(only_writer(folder / ".lock", f"the cell {folder.name}"))
        except DataError:
            if not said:
                say(f"{folder.name}: a process of an earlier run still works on it; waiting")
            said = True
            backoff.wait()
    return None


def _run_verb(folder: Path, cell: dict[str, Any], launch: Launch, stop: Stop, lock: int) -> int:
    """Start the verb, its output into log.txt, and wait."""
    if cell["verb"] == "export-hf":  # it wants a new folder, and there is nothing in it to go on from
        shutil.rmtree(folder / PRODUCT["export-hf"], ignore_errors=True)
    command = launch(["pause_megatron", cell["verb"], *arguments_of(folder, cell)], cell["ranks"])
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Should this process be killed, the verb saves and ends as well.
            env={**os.environ, launcher.VARIABLE: launcher.own_name()},
            start_new_session=True,  # Ctrl-C goes to this process, which passes it on once
            pass_fds=(lock,),
        )
        with stop.watching(process):
            code = process.wait()
        log.write(f"= exit code {code}\n")
    return code


def _finish(folder: Path, cell: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
    """Write done.json, the mark of a complete cell."""
    product = folder / PRODUCT[cell["verb"]]
    if not product.is_dir():
        raise DataError(f"{folder.name}: {cell['verb']} ended well, but {product} is not there")
    wall = sum(attempt["seconds"] or 0.0 for attempt in attempts)
    ledger = ledger_of(cell["verb"], product, cell["flops_per_token"], wall, cell["ranks"])
    done = {
        "version": VERSION,
        "name": cell["name"],
        "fingerprint": cell["fingerprint"],
        "attempts": len(attempts),
        "ranks": cell["ranks"],
        "ledger": ledger.as_json(),
    }
    write_json(folder / "done.json", done)


def _attempts(folder: Path) -> list[dict[str, Any]]:
    record = read_json(folder / "attempts.json", missing_ok=True)
    return record["attempts"] if record else []
