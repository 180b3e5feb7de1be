"""A job of the test cluster: what it has done, what it is hit with, and its way through the queue."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pause_megatron.checkpoint import Store
from pause_megatron.host.processes import stat
from support.slurm_cluster import ENDED, Cluster

SECONDS_BETWEEN_LOOKS = 0.2


class EndedTooSoonError(Exception):
    """The run was over before it could be hit: it needs more steps."""


class Job:
    """A run as a job, in a folder of its own.

    Args:
        cluster: where it runs. folder: of the job; the run is in its `run`. command: sbatch's words.

    Attributes:
        number: as SLURM counts. store: the run's checkpoints.
    """

    def __init__(self, cluster: Cluster, folder: Path, *command: str) -> None:
        self.cluster, self.folder, self.store = cluster, folder, Store(folder / "run" / "checkpoints")
        folder.mkdir(exist_ok=True)
        self._looked = 0.0
        self.number = cluster.run("sbatch", "--parsable", f"--chdir={folder}", *command).strip()

    @property
    def done(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.folder / "run" / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def starts(self) -> int:
        """How often the script has begun."""
        return len(re.findall(r"^start \d+ of job", self._output(), flags=re.MULTILINE))

    def resumed(self) -> list[int]:
        """The steps that its starts went on from, in order."""
        return [int(step) for step in re.findall(r"resuming after step (\d+) from", self.logs())]

    def stopped(self) -> list[int]:
        """The steps that it stopped after when it was asked to, in order."""
        return [int(step) for step in re.findall(r"stopped after step (\d+)", self.logs())]

    def state(self) -> str:
        """As squeue calls it."""
        return self._look()[0]

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Wait, and spare the job the two minutes that SLURM holds a requeued one.

        Raises:
            EndedTooSoonError: the run is complete, and the condition was never true.
            AssertionError: it ended in another way, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.state()}\n{self.logs()}"
            if time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
                state, reason = self._look()
                if state == "PENDING" and reason == "BeginTime":
                    self._start_now()
                if state in ENDED and not condition():
                    if state == "COMPLETED":
                        raise EndedTooSoonError(what)
                    raise AssertionError(f"{what}: {state}\n{self.logs()}")
                self._looked = time.monotonic()
            time.sleep(0.005)

    def wait_for_steps(self, count: int) -> None:
        """Wait until the present start has done so many steps on top of those it began with."""
        starts = self.starts
        self.wait(lambda: len(self.resumed()) >= starts - 1, "its start")
        step = (self.resumed()[-1] if starts > 1 else 0) + count
        self.wait(lambda: self.done >= step, f"step {step}")

    def hit(self, blow: Callable[[], object], what: str) -> None:
        """Strike, and wait for the next start."""
        starts = self.starts
        blow()
        self.wait(lambda: self.starts > starts, f"a start after {what}")

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        self.wait(lambda: self.state() == "COMPLETED", "end")

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to the processes of ranks, on this machine."""
        for rank in ranks:
            for process in self._processes(rank):
                os.kill(process, number)

    def freeze_in_a_save(self) -> None:
        """Stop both ranks while a checkpoint is being written."""

        def frozen() -> bool:
            if not any(self.store.folder.glob(".incoming-*")):
                return False
            self.signal(signal.SIGSTOP, 0, 1)
            while any((stat(process) or "X")[0] not in "TtZX" for rank in (0, 1) for process in self._processes(rank)):
                time.sleep(0.001)
            if any(self.store.folder.glob(".incoming-*")):
                return True
            self.signal(signal.SIGCONT, 0, 1)  # it was over: the next one
            return False

        self.wait(frozen, "a save")

    def logs(self) -> str:
        """The script's output and every rank's."""
        files = sorted((path for path in self.folder.rglob("*.txt") if path.is_file()), key=_by_number)
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files)

    def _output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"*-{self.number}.txt"))

    def _look(self) -> tuple[str, str]:
        """State, and why it waits."""
        line = self.cluster.run("squeue", "--noheader", f"--jobs={self.number}", "--states=all", "--format=%T|%r")
        state, _, reason = line.strip().partition("|")
        return state, reason

    def _start_now(self) -> None:
        """End SLURM's hold of a requeued job.

        Its former start must be over for slurmd too, or its end is taken for that of the next start. And credentials
        are as old as the second in which they were made: one of the second in which the former were revoked is refused.
        """
        begun = time.monotonic()
        while (left := self.cluster.ending(self.number)) or time.monotonic() < begun + 1.1:
            assert time.monotonic() < begun + 60, f"job {self.number} does not end: {left}\n{self.cluster.logs()}"
            time.sleep(0.05)
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def _processes(self, rank: int) -> list[int]:
        """Of a rank: those of this job of this cluster, as another cluster on this machine counts jobs too."""
        wanted = {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}", f"SLURM_CONF={self.cluster.config}"}
        found = []
        for folder in Path("/proc").iterdir():
            try:
                variables = (folder / "environ").read_text().split("\0") if folder.name.isdecimal() else []
                if wanted <= set(variables) and "pause_megatron" in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except (OSError, UnicodeDecodeError):
                continue  # it has ended, or is no python of ours
        return found


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sort key of paths: job 9 comes before job 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))]
