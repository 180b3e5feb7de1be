"""Running one cell: its verb in a process of its own, its log, its ledger, and done.json."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import INPUT, OUTPUT, PRODUCT, SCORES
from pause_megatron.experiment.ledger import ledger_of
from pause_megatron.experiment.provenance import OriginFile, origin
from pause_megatron.experiment.stored import Attempt, AttemptsFile, CellFile, DoneFile, FailedFile, is_done
from pause_megatron.files.durable import only_writer
from pause_megatron.files.locks import Backoff
from pause_megatron.host.launcher import own_name
from pause_megatron.host.launcher_search import VARIABLE

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75
"""As of the training verbs: stopped on request; the same command resumes."""

Launch = Callable[[Sequence[str], int], list[str]]
"""(program, ranks) -> the command line that starts the program on that many ranks."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        code: EXIT_DONE, EXIT_STOPPED, or the verb's exit code.
        seconds: Duration of this attempt, seconds.
        cached: Whether the cell was complete before, so that nothing ran.
    """

    code: int
    seconds: float = 0.0
    cached: bool = False


class Stop:
    """A request to stop, shared by the threads of a local run. Running verbs save and exit with EXIT_STOPPED.

    Attributes:
        requested: Whether a stop has been requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._running: set[subprocess.Popen[bytes]] = set()

    def request(self) -> None:
        """Start no further cell, and send SIGTERM to the running verbs."""
        self.requested = True
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def registered(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Stop the process on request while the body runs."""
        self._running.add(process)
        if self.requested:  # between its start and now
            self.request()
        try:
            yield
        finally:
            self._running.discard(process)


def alone_or_deepspeed(program: Sequence[str], ranks: int, gpus: Sequence[str] = ()) -> list[str]:
    """Return the command line of one rank, or of several under DeepSpeed's launcher with a port of their own.

    Args:
        program: Module and arguments.
        ranks: Number of ranks.
        gpus: A GPU for each rank, as CUDA_VISIBLE_DEVICES names them; () leaves the choice to the program.
    """
    if ranks == 1:
        variables = ["env", f"CUDA_VISIBLE_DEVICES={gpus[0]}"] if gpus else []
        return [*variables, sys.executable, "-m", *program]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --num_gpus takes the first ones and ignores CUDA_VISIBLE_DEVICES.
    devices = ["--include", f"localhost:{','.join(gpus)}"] if gpus else ["--num_gpus", str(ranks)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *devices, "--master_port", str(port)]
    return [*launcher, "--module", *program]


def under_srun(program: Sequence[str], ranks: int) -> list[str]:
    """Return the command line inside a SLURM job; several ranks are tasks of a job step.

    Args:
        program: Module and arguments.
        ranks: Number of ranks.
    """
    python = [sys.executable, "-m", *program]
    return python if ranks == 1 else ["srun", "--ntasks", str(ranks), "--kill-on-bad-exit=1", *python]


def run_cell(folder: Path, launch: Launch, stop: Stop) -> Outcome:
    """Run the cell that FOLDER/cell.json describes, unless it is complete.

    The verb's process inherits the cell's lock. If this process is killed, the verb ends soon after it, and the next
    attempt waits for the lock.

    Args:
        folder: Folder of the cell.
        launch: How a program is started on several ranks.
        stop: The request to stop early.

    Raises:
        DataError: cell.json cannot be used, or the verb exited with 0 and left no product.
    """
    cell = CellFile.read(folder)
    with contextlib.ExitStack() as closing:
        lock = _wait_for_lock(folder, closing, stop)
        if is_done(folder, cell.fingerprint):
            return Outcome(EXIT_DONE, cached=True)
        if stop.requested or lock is None:
            return Outcome(EXIT_STOPPED)
        return _attempt(folder, cell, launch, stop, lock)


def arguments_of(folder: Path, cell: CellFile) -> list[str]:
    """Return the verb's arguments with paths in place of the placeholders.

    Args:
        folder: Folder of the cell.
        cell: Its cell.json.
    """
    paths = {OUTPUT: str(folder / PRODUCT[cell.verb])}
    for placeholder, name in ((INPUT, cell.input), (SCORES, cell.scores)):
        if name:
            paths[placeholder] = str(folder.parent / name / PRODUCT[CellFile.read(folder.parent / name).verb])
    arguments = []
    for argument in cell.arguments:
        for placeholder, path in paths.items():
            argument = argument.replace(placeholder, path)
        arguments.append(argument)
    return arguments


def last_lines(folder: Path, count: int = 15) -> str:
    """Return the end of a cell's log, indented.

    Args:
        folder: Folder of the cell.
        count: Number of lines.
    """
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(f"    {line}" for line in lines[-count:])


def _wait_for_lock(folder: Path, closing: contextlib.ExitStack, stop: Stop) -> int | None:
    """Acquire the cell's lock; return its file descriptor, or None if a stop was requested while waiting."""
    waiting, backoff = False, Backoff(0.5, 0.5)
    while not stop.requested:
        try:
            return closing.enter_context(only_writer(folder / ".lock", f"the cell {folder.name}"))
        except DataError:
            if not waiting:
                log.info(f"{folder.name}: is still being computed by an earlier process; waiting")
            waiting = True
            backoff.wait()
    return None


def _attempt(folder: Path, cell: CellFile, launch: Launch, stop: Stop, lock: int) -> Outcome:
    """Run the verb once, and record the attempt and how it ended."""
    (folder / FailedFile.NAME).unlink(missing_ok=True)
    earlier = (AttemptsFile.read_if_present(folder) or AttemptsFile()).attempts
    attempt = Attempt(begun=time.time(), seconds=None)
    AttemptsFile(attempts=(*earlier, attempt)).write(folder)
    OriginFile(origin=origin()).write(folder)
    code = _run_verb(folder, cell, launch, stop, lock)
    seconds = time.time() - attempt.begun
    attempts = (*earlier, Attempt(begun=attempt.begun, seconds=seconds))
    AttemptsFile(attempts=attempts).write(folder)
    failure = FailedFile(code=code, fingerprint=cell.fingerprint)
    if code == EXIT_DONE:
        try:
            _finish(folder, cell, attempts)
        except DataError:
            failure.write(folder)
            raise
    elif code != EXIT_STOPPED and not stop.requested:
        failure.write(folder)
    return Outcome(EXIT_STOPPED if stop.requested and code else code, seconds)


def _run_verb(folder: Path, cell: CellFile, launch: Launch, stop: Stop, lock: int) -> int:
    """Start the verb with its output in log.txt, wait, and return its exit code."""
    if cell.verb == "export-hf":  # it needs a new folder, and cannot resume
        shutil.rmtree(folder / PRODUCT["export-hf"], ignore_errors=True)
    command = launch(["pause_megatron", cell.verb, *arguments_of(folder, cell)], cell.ranks)
    with open(folder / "log.txt", "a", encoding="utf-8") as log_file:
        log_file.write(f"$ {shlex.join(command)}\n")
        log_file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            # If this process is killed, the verb saves and ends as well.
            env={**os.environ, VARIABLE: own_name()},
            start_new_session=True,  # Ctrl-C reaches this process only, which forwards it once
            pass_fds=(lock,),
        )
        with stop.registered(process):
            code = process.wait()
        log_file.write(f"= exit code {code}\n")
    return code


def _finish(folder: Path, cell: CellFile, attempts: Sequence[Attempt]) -> None:
    """Write done.json."""
    product = folder / PRODUCT[cell.verb]
    if not product.exists():
        raise DataError(f"{folder.name}: expected {cell.verb} to write {product}, got exit code 0 and nothing there")
    wall_seconds = sum(attempt.seconds or 0.0 for attempt in attempts)
    DoneFile(
        name=cell.name,
        fingerprint=cell.fingerprint,
        attempts=len(attempts),
        ranks=cell.ranks,
        ledger=ledger_of(cell.verb, product, cell.flops_per_token, wall_seconds, cell.ranks),
    ).write(folder)
