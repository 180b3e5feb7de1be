"""Tests that need a GPU, or say something there. An ordinary run of the suite leaves them out; on a CPU they do what a
CPU has.

Each records figures. launchers/gpu_check.sh runs them part by part and puts the figures into its report.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


class Record:
    """Outcomes and figures of this process, written to GPU_CHECK_RECORD after every change."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.lines: list[str] = []

    def write(self) -> None:
        if place := os.environ.get("GPU_CHECK_RECORD"):
            partial = Path(f"{place}.partial")
            partial.write_text(json.dumps(vars(self), default=str))
            os.replace(partial, place)


RECORD = Record()


class Figures:
    """What one test found out.

    `figures(loss=1.5)` puts values into the report; `figures.line("...")` puts a sentence into the summary too.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, **values: Any) -> None:
        RECORD.figures.setdefault(self._name, {}).update(values)
        RECORD.write()

    def line(self, text: str) -> None:
        print(f"  {text}", flush=True)
        RECORD.lines.append(text)
        RECORD.write()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where a test puts its figures."""
    return Figures(request.node.name)


@pytest.fixture(scope="session")
def cuda() -> None:
    """Without a CUDA device the test is not run."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a prepared corpus of real English with a vocabulary of 1000; parts of one check share it."""
    from benchmarks.version_losses import english

    folder = Path(os.environ.get("GPU_CHECK_SHARED") or tmp_path_factory.mktemp("english"))
    with _locked(folder / "lock"):
        done = folder / "prefix"
        if not done.exists():
            prefix = english(str(folder))
            done.write_text(prefix)
        return done.read_text()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _asked(config: pytest.Config) -> bool:
    from support.hidden_gpu import asks_for_gpu

    return asks_for_gpu(config.option.markexpr, config.args, config.rootpath)


def pytest_configure(config: pytest.Config) -> None:
    if seconds := os.environ.get("GPU_CHECK_STACKS_AFTER"):
        faulthandler.dump_traceback_later(float(seconds), file=sys.__stderr__)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker("gpu")
    if not _asked(config):
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    reason = str(report.longrepr[2]).removeprefix("Skipped: ") if report.skipped else ""
    name = report.nodeid.rpartition("::")[2]
    RECORD.tests.append(
        {"name": name, "outcome": report.outcome, "seconds": round(report.duration, 3), "reason": reason}
    )
    RECORD.write()
