"""What the GPU check leaves: report.json, summary.txt and logs.txt, each complete after every part."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from child import Outcome
from wheels import ROOT

COLUMNS = 100
CHARACTERS = 12_000  # of the summary: what fits into the tail of a terminal
LOG_LINES = 40  # of a failed part, in the summary
LOG_CHARACTERS = 1_000_000  # of each part, in logs.txt
GOOD = ("passed", "not run")


class Report:
    """The report of one check.

    Args:
        folder: where the files go; made if it is not there.
        parts: names of the parts, in the order of the table.

    Attributes:
        failed: names of the parts that did not pass.
    """

    def __init__(self, folder: Path, parts: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "summary.txt", "logs.txt", "benchmark-130m.json", "benchmark-1b.json"):
            (folder / name).unlink(missing_ok=True)  # those of an earlier check
        self._begun = time.monotonic()
        self._logs: dict[str, str] = {}
        self._parts: dict[str, dict[str, Any]] = {
            name: {"name": name, "status": "waiting", "reason": "", "seconds": 0.0} for name in parts
        }
        self._report: dict[str, Any] = {
            "format": "pause-megatron gpu_check",
            "version": 1,
            "complete": False,
            "problem": "",
            "warnings": [],
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
            "machine": machine(),
        }
        self._write()

    @property
    def failed(self) -> list[str]:
        return [part["name"] for part in self._parts.values() if part["status"] not in (*GOOD, "waiting", "running")]

    def installed(self, places: Sequence[str]) -> None:
        """Wheels were unpacked into these folders."""
        self._report["machine"] = machine(places)
        self._write()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self._begun:5.0f} s] {text}", flush=True)

    def warn(self, text: str) -> None:
        """Add a note for the reader of the report."""
        self.say(text)
        self._report["warnings"].append(text)
        self._write()

    def started(self, name: str) -> None:
        """A part has begun."""
        self.say(f"{name}: started")
        self._parts[name]["status"] = "running"
        self._write()

    def left_out(self, name: str, reason: str) -> None:
        """There is no time for a part."""
        self._parts[name] |= {"status": "no time", "reason": reason}
        self.say(f"{name}: no time: {reason}")
        self._write()

    def finished(self, outcome: Outcome) -> None:
        """A part has ended."""
        values = outcome._asdict()
        self._logs[outcome.name] = values.pop("log")
        self._parts[outcome.name] = values
        self.say(f"{outcome.name}: {outcome.status} in {outcome.seconds:.1f} s{_after(outcome.reason)}")
        self._write()

    def close(self, problem: str = "") -> None:
        """Nothing more comes: print the summary."""
        self._report |= {"complete": not problem, "problem": problem}
        self._write()
        print((self.folder / "summary.txt").read_text(encoding="utf-8"), flush=True)

    def _write(self) -> None:
        self._report["seconds"] = round(time.monotonic() - self._begun, 1)
        whole = {**self._report, "parts": list(self._parts.values())}
        replace(self.folder / "report.json", json.dumps(whole, indent=1) + "\n")
        replace(self.folder / "summary.txt", self._summary())
        logs = (f"===== {name}\n{log[-LOG_CHARACTERS:]}\n" for name, log in self._logs.items())
        replace(self.folder / "logs.txt", "".join(logs))

    def _summary(self) -> str:
        """The table, what the parts found, and the last lines of the logs of those that failed."""
        lines = ["", "GPU check of pause-megatron", *machine_lines(self._report["machine"])]
        lines += [f"warning: {text}" for text in self._report["warnings"]]
        if self._report["problem"]:
            lines.append(f"error: {self._report['problem']}")
        lines += ["", f"{'part':14}{'status':11}{'seconds':>8}  remarks"]
        for part in self._parts.values():
            lines.append(f"{part['name']:14}{part['status']:11}{part['seconds']:8.1f}  {part['reason']}".rstrip())
        lines += ["", *(line for part in self._parts.values() for line in part.get("lines", ()))]
        lines = _folded(lines)
        last = f"{self._report['seconds']:.0f} s in all; everything: {self.folder}/report.json, logs: logs.txt"
        room = CHARACTERS - sum(len(line) + 1 for line in lines) - len(last) - 2
        failed = [name for name in self.failed if name in self._logs]
        for index, name in enumerate(failed):
            share = room // (len(failed) - index)
            text = _tail(self._logs[name], f"----- {name}: the last lines of its log", share)
            room -= sum(len(line) + 1 for line in text)
            lines += text
        return "\n".join([*_cut(lines, CHARACTERS - len(last) - 2), last]) + "\n"


def machine(places: Sequence[str] = ()) -> dict[str, Any]:
    """What can be told without an import; `places` are looked for packages in before those of this Python."""
    wanted = "name,driver_version,memory.total"
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "megatron-core", "deepspeed", "transformers"):
        found = metadata.distributions(name=name, path=[*places, *sys.path])
        versions[name] = next((distribution.version for distribution in found), None)
    return {
        "gpus": _output("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader").splitlines(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        **versions,
    }


def machine_lines(found: dict[str, Any]) -> list[str]:
    """The machine in two lines."""
    versions = [f"{name} {found[name]}" for name in ("torch", "triton", "megatron-core", "deepspeed") if found[name]]
    return [
        f"{'; '.join(found['gpus']) or 'nvidia-smi finds no GPU'}; {found['cores']} cores",
        f"Python {found['python']}, {', '.join(versions)}",
    ]


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _after(reason: str) -> str:
    return f": {reason}" if reason else ""


def _folded(lines: list[str]) -> list[str]:
    """Lines of at most COLUMNS characters."""
    found = []
    for line in lines:
        while len(line) > COLUMNS:
            place = line.rfind(" ", 20, COLUMNS + 1)
            place = COLUMNS if place < 0 else place
            found.append(line[:place])
            line = f"    {line[place:].lstrip()}"
        found.append(line)
    return found


def _tail(log: str, head: str, characters: int) -> list[str]:
    """The head, and as many of the last lines of a log as fit."""
    kept: list[str] = []
    room = characters - len(head) - 2
    for line in reversed(log.splitlines()[-LOG_LINES:]):
        line = line[:COLUMNS]
        room -= len(line) + 1
        if room < 0:
            break
        kept.insert(0, line)
    return ["", head, *kept] if kept else []


def _cut(lines: list[str], characters: int) -> list[str]:
    """The first lines, as many as fit."""
    kept = []
    for line in lines:
        characters -= len(line) + 1
        if characters < 0:
            break
        kept.append(line)
    return kept
