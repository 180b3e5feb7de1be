"""Requests to stop: signals before and during steps, and the clock."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pause_megatron.errors import ConfigError
from pause_megatron.train.signals import StopRequest, deadline


def test_signals_ask_and_a_second_one_changes_nothing():
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.reason == "SIGUSR2"


@pytest.fixture
def _interruptible():
    """Python's own handler of SIGINT: a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_before_the_steps_an_interrupt_ends_the_program_and_during_them_it_asks():
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with stop.during_steps(None):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason == "SIGINT"


def test_the_clock_asks_too():
    stop = StopRequest()
    with stop.during_steps(time.time() + 3600):
        assert not stop
    with stop.during_steps(time.time() - 1):
        assert stop and stop.reason == "the job's time is nearly over"


def test_the_deadline_of_a_job():
    end = int(time.time()) + 360
    assert deadline(300, {"SLURM_JOB_END_TIME": str(end)}) == end - 300
    assert deadline(0, {"SLURM_JOB_END_TIME": "1700000300"}) is None
    assert deadline(300, {}) is None
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME: expected seconds since 1970, came 'soon'"):
        deadline(300, {"SLURM_JOB_END_TIME": "soon"})


def test_a_job_too_short_for_a_step_is_refused_and_does_not_come_back_for_ever():
    for left in (-10, 299):
        with pytest.raises(ConfigError, match="before_end_seconds=300: expected less than the job's time, of which "):
            deadline(300, {"SLURM_JOB_END_TIME": str(int(time.time()) + left)})
