"""Requests to stop: signals before and during steps, and the clock."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pause_megatron.errors import ConfigError
from pause_megatron.host import launcher
from pause_megatron.host.processes import GONE, STOP_ASKED, TAKING_STEPS
from pause_megatron.train.guards.signals import STOP_SIGNALS, StopRequest, deadline

ROOT = Path(__file__).resolve().parents[3]


def test_a_signal_requests_a_stop_and_a_second_one_changes_nothing():
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
def test_sigint_ends_the_process_before_the_steps_and_stops_it_in_them():
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with stop.during_steps(None):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason == "SIGINT"


@pytest.mark.usefixtures("_interruptible")
def test_sigint_after_the_steps_has_no_effect_until_the_context_ends():
    with StopRequest() as stop:
        with stop.during_steps(None):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_put_back_and_an_ignored_hangup_stays_ignored():
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop, stop.during_steps(None):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, was)
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


PROGRAM = """
import os, signal, subprocess, sys, threading, time
from pause_megatron.train.guards.signals import StopRequest
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)  # the handler's own line has no reader either
def write():
    try:
        os.write(writer, b"x")
    except BrokenPipeError:
        return
    sys.exit("a pipe without a reader was written")
def until_asked(seconds):
    end = time.monotonic() + seconds
    while not stop and time.monotonic() < end:
        time.sleep(0.01)
    return stop.reason
if sys.argv[2] == "default":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite may run under nohup
with StopRequest() as stop:
    for _ in range(3):
        write()
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert until_asked(0.3) is None, "a failed write was taken for a request"
    subprocess.run("yes | head -n 1", shell=True, stdout=subprocess.DEVNULL, timeout=20)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    assert until_asked(20) == sys.argv[1], stop.reason
sys.exit(75)
"""


@pytest.mark.parametrize("sigpipe", ["ignored", "default"])
@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGPIPE])
def test_signals_request_a_stop_without_a_reader_and_failed_writes_do_not(number, sigpipe):
    command = [sys.executable, "-c", PROGRAM, signal.Signals(number).name, sigpipe]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 75


def test_the_deadline_requests_a_stop():
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
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME: expected seconds since 1970, got 'soon'"):
        deadline(300, {"SLURM_JOB_END_TIME": "soon"})


def test_a_job_too_short_for_a_step_is_refused_not_requeued_forever():
    for left in (-10, 299):
        with pytest.raises(ConfigError, match="before_end_seconds=300: expected less than the job's time, of which "):
            deadline(300, {"SLURM_JOB_END_TIME": str(int(time.time()) + left)})


def test_a_launcher_that_is_gone_requests_a_stop(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        monkeypatch.setattr(launcher._own, "_channel", ours)
        monkeypatch.setattr(launcher._own, "_gone", False)
        with StopRequest() as stop, stop.during_steps(None):
            assert theirs.recv(16) == TAKING_STEPS and not stop
            theirs.send(GONE)
            assert stop and stop.reason == "the launcher has exited"
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert theirs.recv(16) == STOP_ASKED and stop.reason == "SIGTERM"
