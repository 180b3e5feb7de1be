"""Options and fixtures of the whole suite."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports torch: the ranks of a pool share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.hidden_gpu import asks_for_gpu
from support.records import FOLDERS, MADE

with contextlib.suppress(ImportError):  # not installed where the GPU is checked
    from hypothesis import HealthCheck, settings

    # A machine with other work is no fault of an example's.
    settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tests too, with their full counts")
    parser.addoption("--update-golden", action="store_true", help="write tests/assets/losses anew")


def pytest_configure(config: pytest.Config) -> None:
    logging.getLogger("pause_megatron").setLevel(logging.INFO)  # for caplog
    if not asks_for_gpu(config.option.markexpr, config.args, config.rootpath):
        # Before anything imports torch, and for every child process: a machine with CUDA is then one without.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Triton's kernels then run in its interpreter. It must know when it is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    return f"records of tasks: {', '.join(f'{name} in {folder}' for name, folder in FOLDERS.items())}"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from support.compatibility import is_part

    for item in items:
        if is_part(item.nodeid):
            item.add_marker("compat")
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="slow: run with --full")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given: tests that scale their counts read it."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def task_records() -> Path:
    """Folder of all tasks' records, made for the tests, with each data set's fields and peculiarities."""
    return MADE


@pytest.fixture(scope="session", params=FOLDERS.values(), ids=FOLDERS)
def record_folder(request: pytest.FixtureRequest) -> Path:
    """The same, and once more the thousands of real records where they lie beside the repository."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _rank_pools() -> Iterator[None]:
    from support.ranks import close_pools

    yield
    close_pools()
