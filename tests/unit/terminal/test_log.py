"""Log records reach standard error on the ranks that should write them, and nowhere twice."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from pause_megatron.terminal.log import EVERY_RANK, ROOT, log_run_to_stderr, log_to_stderr, set_rank

log = logging.getLogger(f"{ROOT}.some.module")


@pytest.fixture(autouse=True)
def _rank_zero():
    yield
    set_rank(0)


def speak() -> None:
    log.debug("debug")
    log.info("info")
    log.warning("warning")
    log.info("own", extra=EVERY_RANK)
    log.error("error")


def test_rank_zero_writes_everything_from_info_on(capsys):
    with log_to_stderr(timestamps=False):
        speak()
    assert capsys.readouterr().err.splitlines() == [
        "pause-megatron: info",
        "pause-megatron: warning: warning",
        "pause-megatron: own",
        "pause-megatron: error: error",
    ]


def test_other_ranks_write_errors_and_what_concerns_them(capsys):
    set_rank(3)
    with log_to_stderr(timestamps=False):
        speak()
    assert capsys.readouterr().err.splitlines() == [
        "pause-megatron: [rank 3] own",
        "pause-megatron: [rank 3] error: error",
    ]


def test_a_run_has_time_stamps_and_gives_the_handler_back(capsys):
    with log_to_stderr(timestamps=False):
        with log_run_to_stderr():
            log.info("inside")
        log.info("outside")
    inside, outside = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] inside", inside)
    assert outside == "pause-megatron: outside"
    assert logging.getLogger(ROOT).handlers == []


def test_a_root_handler_at_its_default_level_does_not_silence_a_run(capsys):
    """As after `logging.basicConfig()`, or one `logging.warning(...)` in a notebook."""
    logger, level = logging.getLogger(ROOT), logging.getLogger(ROOT).level
    logger.setLevel(logging.NOTSET)  # the root logger's, which is WARNING
    try:
        with log_run_to_stderr():
            log.info("shown")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err.endswith("] shown\n")


def test_a_program_with_its_own_logging_keeps_it(capsys):
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    try:
        with log_run_to_stderr():
            log.info("to the program")
    finally:
        root.removeHandler(handler)
    assert stream.getvalue() == "to the program\n" and capsys.readouterr().err == ""


def test_a_record_on_a_terminal_does_not_tear_a_progress_bar(monkeypatch):
    from tqdm import tqdm

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with log_to_stderr(timestamps=False), tqdm(total=2, file=stream) as bar:
        bar.update()
        log.info("a line")
    assert "\rpause-megatron: a line\n" in stream.getvalue().replace(" " * 10, "").replace("\r\r", "\r")
