"""One part of the GPU check: pytest in a process of its own, with a time limit, a log and a file of figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wheels import ROOT

NO_TESTS = 5  # pytest's exit code
STACKS_BEFORE = 3.0  # seconds before the limit at which a part that hangs prints where


class Outcome(NamedTuple):
    """How a part ended.

    Attributes:
        name: of the part.
        status: passed, failed, crashed, timed out, not run (nothing of it can be run here) or stopped.
        reason: why it did not pass, or what of it was not run.
        seconds: it took.
        tests: name, outcome, seconds and reason of each test.
        figures: what the tests recorded, by test.
        lines: sentences for the summary.
        log: all that was printed.
    """

    name: str
    status: str
    reason: str
    seconds: float
    tests: list[dict[str, Any]]
    figures: dict[str, dict[str, Any]]
    lines: list[str]
    log: str


class Child:
    """A part that runs."""

    def __init__(
        self, name: str, tests: Sequence[str], limit: float, scratch: Path, environment: Mapping[str, str]
    ) -> None:
        stem = name.replace(" ", "-")
        self.name, self.limit = name, limit
        self._log, self._record = scratch / f"{stem}.log", scratch / f"{stem}.json"
        self._begun = time.monotonic()
        self._late = False
        self._taken: float | None = None
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
        command += ["--disable-warnings", f"--basetemp={scratch / stem}", "--rootdir", str(ROOT), *tests]
        own = {
            "GPU_CHECK_RECORD": str(self._record),
            "GPU_CHECK_STACKS_AFTER": str(max(1.0, limit - STACKS_BEFORE)),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether it is over; a part that is late is ended here."""
        if self._process.poll() is None:
            if time.monotonic() - self._begun < self.limit:
                return False
            self._late = True
        self.kill()
        return True

    def kill(self) -> None:
        """Kill the process and all that it started, in any session."""
        if self._taken is None:
            self._taken = time.monotonic() - self._begun
        for pid in [*descendants(self._process.pid), *_session(self._process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def outcome(self, stopped: bool = False) -> Outcome:
        """Return the outcome."""
        record: dict[str, Any] = {"tests": [], "figures": {}, "lines": []}
        if self._record.exists():
            record = json.loads(self._record.read_text())
        status, reason = self._status(record["tests"], stopped)
        log = self._log.read_text(encoding="utf-8", errors="replace")
        seconds = round(self._taken or 0.0, 2)
        return Outcome(self.name, status, reason, seconds, record["tests"], record["figures"], record["lines"], log)

    def _status(self, tests: list[dict[str, Any]], stopped: bool) -> tuple[str, str]:
        code = self._process.returncode
        skipped = sorted({test["reason"] for test in tests if test["outcome"] == "skipped"})
        failed = [test["name"] for test in tests if test["outcome"] == "failed"]
        if stopped:
            return "stopped", "the check was asked to end"
        if self._late:
            return "timed out", f"after {self.limit:.0f} s"
        if code < 0:
            return "crashed", signal.Signals(-code).name
        if code not in (0, NO_TESTS):
            return "failed", ", ".join(failed) or f"pytest exited with {code}"
        if not any(test["outcome"] == "passed" for test in tests):
            return "not run", "; ".join(skipped) or "no test"
        left = sum(test["outcome"] == "skipped" for test in tests)
        return "passed", f"{left} of {len(tests)} not run: {'; '.join(skipped)}" if left else ""


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started, deepest last."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(entry)
        if fields:
            parents[int(entry.name)] = int(fields[1])
    found, waiting = [], [pid]
    while waiting:
        above = waiting.pop()
        below = [child for child, parent in parents.items() if parent == above]
        found += below
        waiting += below
    return found


def _session(pid: int) -> list[int]:
    """Processes of the session that a process leads; their parents may be gone."""
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if (fields := _stat(entry)) and int(fields[3]) == pid and int(entry.name) != pid
    ]


def _stat(entry: Path) -> list[str]:
    """State, parent, process group, session, ...; nothing if the process is gone."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
