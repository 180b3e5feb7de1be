"""Lock files: concurrent processes, exited and suspended owners, and files that other users have created."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from pause_megatron.errors import DataError
from pause_megatron.files import locks as holding
from pause_megatron.files.durable import only_writer, own_temporary_folder
from pause_megatron.files.locks import HeldError, Holding, is_orphan, read
from pause_megatron.host import processes
from pause_megatron.host.processes import Watched

BEAT = 0.1
ROOT = Path(__file__).resolve().parents[3]


def ended_process() -> processes.Process:
    """A process that has exited."""
    process = subprocess.Popen(["sleep", "60"])
    known = processes.process(process.pid)
    process.kill()
    process.wait()
    return known


def record_of(known: processes.Process, **other) -> bytes:
    record = {"host": "here", "process": known.pid, "started": known.started, "machine": processes.machine()}
    return json.dumps({**record, "token": "t", "since": "now", **other}).encode()


# In a process without threads, which may fork: all children try to take the lock at the same time.
RACE = """
import errno, json, multiprocessing, os, sys, time
from pathlib import Path
from pause_megatron.files.locks import HeldError, Holding

def refuse(*arguments, **options):
    raise OSError(errno.EPERM, "no links")

def take(path, barrier, wins):
    barrier.wait(60)
    try:
        held = Holding(path, 0.1)
    except HeldError:
        return
    with wins.get_lock():
        wins.value += 1
    time.sleep(0.8)
    assert held.close()

folder, left, links, rounds = Path(sys.argv[1]), sys.argv[2].encode(), sys.argv[3] == "True", int(sys.argv[4])
if not links:
    os.link = refuse
context, answers = multiprocessing.get_context("fork"), []
for number in range(rounds):
    path, wins, barrier = folder / str(number), context.Value("i", 0), context.Barrier(6)
    if left:
        path.write_bytes(left)
    processes = [context.Process(target=take, args=(path, barrier, wins)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    answers.append([wins.value, [process.exitcode for process in processes], [str(p) for p in folder.iterdir()]])
print(json.dumps(answers))
"""


@pytest.mark.parametrize("left", [None, "dead"])
@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_concurrent_processes_gets_the_lock(tmp_path, left, links, full):
    """Also with the stale lock of an exited process, and without hard links."""
    rounds = 20 if full else 1
    arguments = [str(tmp_path), record_of(ended_process()).decode() if left else "", str(links), str(rounds)]
    done = python(RACE, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, [0] * 6, []]] * rounds


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_a_running_owner_is_named_and_a_reused_pid_is_not_an_owner(tmp_path):
    path, own = tmp_path / "owner", processes.process(os.getpid())
    path.write_bytes(record_of(own))
    with pytest.raises(HeldError, match=f"held by process {own.pid} on here, since now"):
        Holding(path, BEAT)
    path.write_bytes(record_of(processes.Process(own.pid, own.started - 1)))
    Holding(path, BEAT).close()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_was_taken_over_detects_it_and_writes_nothing(tmp_path):
    path = tmp_path / "owner"
    frozen = Holding(path, BEAT)
    path.unlink()  # as another machine does after missed heartbeats
    other = {**read_after_write(path, ended_process()), "host": "another-machine"}
    path.write_text(json.dumps(other))
    time.sleep(3 * BEAT)
    assert json.loads(path.read_text()) == other
    assert frozen.taken_over().startswith("process ") and "another-machine" in frozen.taken_over()
    assert frozen.close() is False
    assert json.loads(path.read_text()) == other


def read_after_write(path: Path, known: processes.Process) -> dict:
    path.write_bytes(record_of(known))
    return dict(read(path))


def test_the_file_is_checked_only_after_a_suspension(tmp_path, monkeypatch):
    held = Holding(tmp_path / "owner", 1000.0)
    (tmp_path / "owner").write_text(json.dumps({"token": "another", "process": 1}))
    assert held.taken_over_while_away() == ""
    clocks = holding._clocks
    for jump in (
        (3001.0, 0.0),
        (0.0, 3001.0),
    ):  # suspended process; suspended machine, whose monotonic clock stopped too
        monkeypatch.setattr(holding, "_clocks", lambda jump=jump: tuple(map(sum, zip(clocks(), jump, strict=True))))
        assert held.taken_over_while_away().startswith("process 1 on")
    held.close()


def test_a_deleted_lock_file_is_created_again(tmp_path):
    held = Holding(tmp_path / "owner", BEAT)
    (tmp_path / "owner").unlink()
    assert held.taken_over() == "" and read(tmp_path / "owner")["process"] == os.getpid()
    with pytest.raises(HeldError):
        Holding(tmp_path / "owner", BEAT)
    assert held.close() is True and list(tmp_path.iterdir()) == []
    folder = tmp_path / "folder"
    folder.mkdir()
    held = Holding(folder / "owner", BEAT)
    (folder / "owner").unlink()
    folder.rmdir()
    assert held.taken_over() == "" and held.close() is True


@pytest.mark.parametrize("content", [b"", b"half a rec", b"[]", b"{}", b"\xff" * 100, b"[" * 200_000, b"null", b"7"])
@pytest.mark.parametrize("seconds", [0, -3600, 3600])
def test_an_unreadable_lock_is_waited_for_and_taken_over(tmp_path, content, seconds, caplog):
    path = tmp_path / "owner"
    path.write_bytes(content)
    os.utime(path, (time.time() + seconds,) * 2)  # also from a clock that is ahead
    began = time.monotonic()
    Holding(path, 0.02).close()
    assert (time.monotonic() - began > 4 * 0.02) or seconds == -3600
    assert "no heartbeat from an unknown process for" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_lock_path_that_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "owner"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(tmp_path / "else")}[kind]()
    with pytest.raises(OSError, match="expected a regular file or none"):
        Holding(path, BEAT)
    assert not (tmp_path / "else").exists()


def no_locks(number: int, descriptor: int, operation: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EACCES, errno.EINVAL, errno.EIO])
def test_one_writer_at_a_time_without_file_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", partial(no_locks, number))
    lock = tmp_path / "lock"
    with only_writer(lock, "the corpus"):
        expected = f"another process is working on the corpus \\({lock}.holder: held by process {os.getpid()} on"
        with pytest.raises(DataError, match=expected), only_writer(lock, "the corpus"):
            pass
    assert list(tmp_path.iterdir()) == []


TAKES = """
import errno, fcntl, os, signal, sys
from pathlib import Path
from unittest import mock
from pause_megatron.files.durable import only_writer
with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, "")), only_writer(Path(sys.argv[1]), "it"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_without_file_locks_a_holder_excludes_and_a_killed_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", partial(no_locks, errno.ENOLCK))
    lock = tmp_path / "lock"
    with only_writer(lock, "it"):
        assert f"DataError: another process is working on it ({lock}.holder: held by" in python(TAKES, str(lock)).stderr
    assert python(TAKES, str(lock)).returncode == -signal.SIGKILL and read(tmp_path / "lock.holder")["process"]
    with only_writer(lock, "it"):  # at once
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_orphaned_owner_is_detected_by_its_launcher(tmp_path):
    launcher = subprocess.Popen(["sleep", "60"])
    orphan = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
    watched = asdict(Watched({"torchrun": processes.process(launcher.pid)}, {}))
    record = json.loads(record_of(processes.process(orphan.pid), launcher=watched))
    assert not is_orphan(record) and not is_orphan({}) and not is_orphan({**record, "launcher": [1]})
    launcher.kill()
    launcher.wait()
    assert is_orphan(record) and not is_orphan({**record, "machine": "elsewhere"})
    orphan.kill()
    orphan.wait()
    assert not is_orphan(record)


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder, victim: folder.symlink_to(victim),
        lambda folder, victim: folder.mkdir(mode=0o777) or folder.chmod(0o777),
        lambda folder, victim: folder.write_text(""),
    ],
)
def test_files_of_other_users_in_the_temporary_folder_are_not_used(
    tmp_path, monkeypatch, plant: Callable[[Path, Path], object]
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert own_temporary_folder().stat().st_mode & 0o777 == 0o700 and own_temporary_folder().parent == tmp_path
    own_temporary_folder().rmdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    plant(tmp_path / f"pause-megatron-{os.getuid()}", victim)
    with pytest.raises(OSError, match="expected a private folder of this user"):
        own_temporary_folder()
    assert list(victim.iterdir()) == []


ODD = ["1e999", "-1e999", "NaN", "-1", "0", '"1"', '"\\u0000"', "[]", "{}", "null", "9" * 400]


def test_a_record_with_invalid_values_names_no_running_process(tmp_path):
    here = json.loads(record_of(processes.process(os.getpid())))
    ended = json.loads(record_of(ended_process()))
    for odd in map(json.loads, ODD):
        for name in ("process", "started", "launcher"):
            assert not holding.runs({**ended, name: odd}) and not is_orphan({**ended, name: odd})
        for given in (odd, {"processes": odd, "listeners": {}}, {"processes": {}, "listeners": odd}):
            assert not is_orphan({**here, "launcher": given})
        for key in ("pid", "started"):  # some belong to a launcher that does not exist
            launcher = {"processes": {"it": {"pid": 1, "started": 1, key: odd}}, "listeners": {}}
            assert is_orphan({**here, "launcher": launcher}) in (True, False)
    (tmp_path / ".owner.json").write_text(json.dumps({**here, "process": float("inf")}))
    assert Holding(tmp_path / ".owner.json", BEAT).close()
