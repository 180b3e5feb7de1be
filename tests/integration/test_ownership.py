"""One job at a time in a run folder; files of an exited job do not block the next."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
from support.forked_ranks import finish, fork, metrics, rank_main, run_config, start
from support.ranks import RankError, run_on_ranks

from pause_megatron.host import processes
from pause_megatron.host.processes import Watched

BEAT = 0.2
ELSEWHERE = {"host": "another-machine", "process": 7, "job": "42", "since": "2026-01-01 00:00:00"}


def wait_for_steps(folder: Path, output: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < steps:
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)


def test_a_second_job_is_refused_and_a_killed_one_is_replaced_at_once(corpus, tmp_path):
    output = tmp_path / "log"
    processes = start(run_config(corpus, tmp_path, 1), output)
    wait_for_steps(tmp_path, output, 1)
    for process in processes:  # stopped, so that it is there as long as it is wanted
        os.kill(process.pid, signal.SIGSTOP)
    second = tmp_path / "second.log"
    finish(start(run_config(corpus, tmp_path, 1), second), second, code=1)
    expected = f"run.dir={tmp_path}: expected a folder that no other job runs in, held by process {processes[0].pid} on"
    assert second.read_text().count(expected) == 2, second.read_text()  # on both ranks
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    third = tmp_path / "third.log"
    finish(start(run_config(corpus, tmp_path, 1), third), third)
    assert not (tmp_path / ".owner.json").exists() and not (tmp_path / ".lock").exists()


def take(folder: str) -> str:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize
    from pause_megatron.train.guards.ownership import own_run

    with initialize(ParallelSection()) as context, own_run(Path(folder), context, BEAT):
        time.sleep(2 * BEAT)
        return (Path(folder) / ".owner.json").read_text()


def beat_elsewhere(owner: str, done: threading.Event) -> None:
    """What a job on another machine does to the file; its lock is not seen here."""
    count = 0
    while not done.is_set():
        count += 1
        partial = Path(owner).with_suffix(".new")
        partial.write_text(json.dumps({**ELSEWHERE, "beat": count}))
        partial.replace(owner)
        time.sleep(BEAT)


def test_a_job_on_another_machine_is_known_by_its_signs_of_life(tmp_path):
    """The file system's lock sees this machine only (Lustre with localflock): the owner's file decides."""
    owner = tmp_path / ".owner.json"
    owner.write_text(json.dumps(ELSEWHERE))
    done = threading.Event()
    living = threading.Thread(target=beat_elsewhere, args=(str(owner), done), daemon=True)
    living.start()
    with pytest.raises(RankError, match="held by process 7 on another-machine, SLURM job 42, since 2026-01-01"):
        run_on_ranks(1, take, str(tmp_path))
    done.set()
    living.join()


def test_the_lock_of_an_exited_job_on_another_machine_is_taken_over(tmp_path):
    owner = tmp_path / ".owner.json"
    for age in (0.0, 3600.0):  # it died just now, and then it waits for a sign of life; or long ago
        owner.write_text(json.dumps(ELSEWHERE))
        os.utime(owner, (time.time() - age, time.time() - age))
        record = json.loads(run_on_ranks(1, take, str(tmp_path))[0])
        assert record["host"] != ELSEWHERE["host"] and record["beat"] >= 1
        assert not owner.exists()
    owner.write_text("half a rec")
    run_on_ranks(1, take, str(tmp_path))


def rank_with_short_beats(config) -> None:
    from pause_megatron.train import run

    run.own_run = functools.partial(run.own_run, beat_seconds=BEAT)
    try:
        rank_main(config)
    except Exception as error:  # as the command line does
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None


def test_an_owner_that_wakes_up_after_a_takeover_writes_nothing_and_ends(corpus, tmp_path):
    output, folder = tmp_path / "log", tmp_path / "run"
    ranks = fork(rank_with_short_beats, (run_config(corpus, folder, 1),), output)
    wait_for_steps(folder, output, 3)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(4 * BEAT)  # that long without a sign of life another machine takes the folder over
    (folder / ".owner.json").unlink()
    (folder / ".owner.json").write_text(json.dumps({**ELSEWHERE, "token": "theirs"}))
    before = files_of(folder)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
    finish(ranks, output, code=2)
    expected = (
        f"error: run.dir={folder}: expected to be the only job there, got another owner, process 7 on another-mac"
    )
    assert output.read_text().count(expected) == 2, output.read_text()
    assert files_of(folder) == before


def files_of(folder: Path) -> dict[str, bytes]:
    """What others read there, and the lock that is theirs as well."""
    names = (".owner.json", ".lock", "metrics.jsonl", "checkpoints/step-*/*")
    return {str(path): path.read_bytes() for name in names for path in folder.glob(name) if path.is_file()}


def take_without_locks(folder: str) -> str:
    with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOTSUP, "no locks")):
        return take(folder)


def test_two_jobs_on_one_host_whose_folder_has_no_locks(tmp_path):
    living = subprocess.Popen(["sleep", "60"])
    known = processes.process(living.pid)
    record = {"host": "h", "process": known.pid, "started": known.started, "machine": processes.machine(), "token": "t"}
    (tmp_path / ".owner.json").write_text(json.dumps(record))
    with pytest.raises(RankError, match=f"held by process {living.pid} on h"):
        run_on_ranks(1, take_without_locks, str(tmp_path))
    living.kill()
    living.wait()
    began = time.monotonic()
    assert json.loads(run_on_ranks(1, take_without_locks, str(tmp_path))[0])["beat"] >= 1
    assert time.monotonic() - began < 10 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("locks", [True, False])
def test_the_end_of_an_orphan_is_waited_for(tmp_path, locks):
    """It holds the lock, and the launcher has exited: it is about to end."""
    launcher = subprocess.Popen(["sleep", "60"])
    gone = asdict(Watched({"torchrun": processes.process(launcher.pid)}, {}))
    launcher.kill()
    launcher.wait()
    with contextlib.ExitStack() as closing:
        descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
        if locks:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
        orphan = subprocess.Popen(command, pass_fds=(descriptor,))
        os.close(descriptor)
        closing.callback(orphan.wait)
        closing.callback(orphan.kill)
        known = processes.process(orphan.pid)
        record = {"host": "h", "process": known.pid, "started": known.started, "machine": processes.machine()}
        (tmp_path / ".owner.json").write_text(json.dumps({**record, "launcher": gone, "token": "t"}))
        threading.Timer(1.0, lambda: (orphan.kill(), orphan.wait())).start()
        began = time.monotonic()
        run_on_ranks(1, take if locks else take_without_locks, str(tmp_path))
        assert 0.9 < time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []
