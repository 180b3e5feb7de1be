"""Detection of a rank's launcher, and the end of a rank when its launcher exits; real processes, no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pause_megatron.errors import ConfigError
from pause_megatron.host import launcher_search, processes
from pause_megatron.host.processes import GONE, STOP_ASKED, TAKING_STEPS, Process, Watched, Watcher

ROOT = Path(__file__).resolve().parents[3]
FINDS = """
import json, os, sys, time
from pause_megatron.host.launcher_search import find
while os.environ.get("ORPHANED") and os.getppid() == int(os.environ["ORPHANED"]):
    time.sleep(0.01)
found = find()
answer = [{name: each.pid for name, each in found.processes.items()}, found.gone]
open(sys.argv[1] + ".part", "w").write(json.dumps(answer))
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""
# Starts a program with further variables and prints its pid; with ORPHANED it exits at once.
STARTS = """
import os, subprocess, sys
variables = dict(word.split("=", 1) for word in sys.argv[1].split())
orphans = {"ORPHANED": str(os.getpid())} if "ORPHANED" in variables else {}
if "GROUP" in variables:
    os.setpgid(0, 0)
new_session = variables.get("START") == "new_session"
child = subprocess.Popen(sys.argv[2:], env={**os.environ, **variables, **orphans}, start_new_session=new_session)
if not orphans:
    child.wait()
"""
# Starts a program, and adopts orphaned processes.
BECOMES_INIT = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
subprocess.Popen(sys.argv[1:])
os.execvp("sleep", ["tini", "60"])
"""
HIDDEN = """
import ctypes, os, socket
from pause_megatron.host import launcher_search, processes
parent, machine = os.getppid(), processes.machine()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)
assert machine and processes.stat(os.getpid()) and not processes.stat(parent)
assert launcher_search.find() == launcher_search.Found()
os.environ[launcher_search.VARIABLE] = f"{parent}@{socket.gethostname()}"
assert launcher_search.find() == launcher_search.Found()
assert processes.Watched({"it": processes.Process(parent, 1)}, {}).gone() == ""
assert processes.Watched({"it": processes.Process(2**22, 1)}, {}).gone()
"""


def found_by(
    tmp_path: Path, *starters: tuple[str, str], wrapped: bool = False
) -> tuple[dict[str, int], list[str], list]:
    """Return the launcher that a process detects at the end of a chain of starters.

    Args:
        starters: (name of the program, variables that it gives its child).

    Returns:
        Numbers by name, names of what is gone, and the number of the first starter.
    """
    answer = tmp_path / "answer"
    command = [sys.executable, "-c", FINDS, str(answer)]
    if wrapped:
        command = ["bash", "-c", '"$0" "$@"; exit $?', *command]
    for name, variables in reversed(starters):
        (tmp_path / name).write_text(STARTS)
        command = [sys.executable, str(tmp_path / name), variables, *command]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PAUSE_"))}
    started = subprocess.Popen(command, env={**environment, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    started.wait(30)
    wait_for(answer.exists)
    there, gone = json.loads(answer.read_text())
    return there, gone, started.pid


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_launcher_is_the_nearest_ancestor_without_its_variables(tmp_path):
    there, gone, agent = found_by(tmp_path, ("anything", "TORCHELASTIC_RUN_ID=none RANK=0 WORLD_SIZE=2"))
    assert (there, gone) == ({"torchrun": agent}, [])
    (tmp_path / "answer").unlink()
    there, gone, agent = found_by(tmp_path, ("anything", "TORCHELASTIC_RUN_ID=none"), wrapped=True)
    assert (there, gone) == ({"torchrun": agent}, [])
    (tmp_path / "answer").unlink()
    there, gone, daemon = found_by(tmp_path, ("orted", "OMPI_COMM_WORLD_RANK=0"))
    assert (there, gone) == ({"mpirun": daemon}, [])


def test_the_deepspeed_runner_is_watched_too(tmp_path):
    there, gone, runner = found_by(tmp_path, ("deepspeed", "A=1"), ("launch", "CROSS_RANK=0 RANK=0"))
    assert (
        there.pop("the deepspeed runner") == runner and there.pop("deepspeed") != runner and (there, gone) == ({}, [])
    )
    (tmp_path / "answer").unlink()
    # Started by hand, without a runner.
    there, gone, by_hand = found_by(tmp_path, ("launch", "CROSS_RANK=0 RANK=0"))
    assert (there, gone) == ({"deepspeed": by_hand}, [])


def test_a_runner_that_exits_during_detection_is_recognized(monkeypatch):
    """Its command line is empty before its children get another parent."""
    parents, found = iter([70, 70, 1, 1, 1]), launcher_search.Found()
    monkeypatch.setattr(processes, "parent", lambda pid: next(parents))
    monkeypatch.setattr(processes, "words", lambda pid: ["/sbin/init"] if pid == 1 else [])
    monkeypatch.setattr(
        processes, "stat", lambda pid: ["S", "1", *(["1", "1"] if pid == 1 else ["69"] * 2), *["0"] * 20]
    )
    launcher_search._runner_of(71, found)
    assert found.gone == ["the deepspeed runner"] and found.processes == {}


@pytest.mark.parametrize("variables", ["RANK=0 WORLD_SIZE=2 LOCAL_RANK=0", "A=1", "SLURM_PROCID=0 SLURM_NTASKS=4"])
def test_a_process_started_by_a_shell_or_a_program_has_no_launcher(tmp_path, variables):
    assert found_by(tmp_path, ("anything", variables))[:2] == ({}, [])


@pytest.mark.parametrize(
    ("mark", "said"), [("TORCHELASTIC_RUN_ID", ["torchrun"]), ("CROSS_RANK", ["deepspeed"]), ("PMI_RANK", [])]
)
def test_a_rank_that_starts_as_an_orphan_detects_it_where_certain(tmp_path, mark, said):
    there, gone, _ = found_by(tmp_path, ("anything", f"{mark}=0 ORPHANED=1"))
    assert (there, gone) == ({}, said)


@pytest.mark.parametrize(
    ("variables", "of_init", "said"),
    [
        ("TORCHELASTIC_RUN_ID=0 START=new_session", "", ["torchrun"]),
        ("TORCHELASTIC_RUN_ID=0 START=new_session", "TORCHELASTIC_RUN_ID=0", []),  # the launcher is outside
        ("TORCHELASTIC_RUN_ID=0", "", []),
        ("CROSS_RANK=0", "", []),
        ("CROSS_RANK=0 GROUP=1", "", ["deepspeed"]),  # variables of a launcher that has exited
    ],
)
def test_the_parent_init_may_be_the_launcher(tmp_path, variables, of_init, said):
    """The process is in the session of init, as in a container."""
    answer = tmp_path / "answer"
    (tmp_path / "starts").write_text(STARTS)
    started = [sys.executable, str(tmp_path / "starts"), f"{variables} ORPHANED=1", sys.executable, "-c", FINDS, answer]
    given = dict(word.split("=") for word in of_init.split())
    init = subprocess.Popen(
        [sys.executable, "-c", BECOMES_INIT, *started],
        env={**os.environ, "PYTHONPATH": str(ROOT), **given},
        start_new_session=True,
    )
    try:
        wait_for(answer.exists)
    finally:
        init.kill()
        init.wait()
    assert json.loads(answer.read_text())[1] == said


def namespace(script: str, folder: Path, environment: dict[str, str]) -> None:
    """Run the program in a shell that is process 1 of a pid namespace, as in a container."""
    command = ["unshare", "--mount", "--pid", "--fork", *([] if os.getuid() == 0 else ["--map-root-user"]), "bash"]
    if subprocess.run([*command, "-c", "mount -t proc proc /proc"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs root, or namespaces for users")
    (folder / "finds.py").write_text(FINDS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment}
    subprocess.run([*command, "-c", script], cwd=folder, env=environment, check=True, timeout=60)


def test_a_launcher_outside_of_the_container_has_not_exited(tmp_path):
    """Its ranks are process 1, or children of it, with or without the launcher's variables there."""
    marks = {"TORCHELASTIC_RUN_ID": "x", "CROSS_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
    finds = "mount -t proc proc /proc; $PYTHON finds.py 1; setsid -w $PYTHON finds.py 2; :"
    namespace(f"{finds}; exec $PYTHON finds.py 3", tmp_path, marks)
    namespace(f"exec -a dumb-init bash -c '{finds.replace('finds.py ', 'finds.py 1')}'", tmp_path, marks)
    exports = "export " + " ".join(f"{name}={value}" for name, value in marks.items())
    namespace(f"{exports}; {finds.replace('finds.py ', 'finds.py 2')}", tmp_path, {})
    for name in ("1", "2", "3", "11", "12", "21", "22"):
        assert json.loads((tmp_path / name).read_text()) == [{}, []]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_a_hidden_process_has_not_exited(tmp_path):
    """As with hidepid, where /proc shows only a user's own processes, and a root daemon started the rank."""
    (tmp_path / "hidden.py").write_text(HIDDEN)
    script = "mount -t proc -o hidepid=2 proc /proc; bash -c '$PYTHON hidden.py; exit $?'"
    namespace(script, tmp_path, {"TORCHELASTIC_RUN_ID": "x", "CROSS_RANK": "0", "PMI_RANK": "0"})


def test_variables_of_another_step_name_no_launcher(monkeypatch):
    """A job submitted from a step inherits them; the step's port is closed, or belongs to another program."""
    for name, value in {"SLURM_STEP_NUM_TASKS": "1", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("SLURM_STEP_LAUNCHER_PORT", str(port))
        assert list(launcher_search.find().listeners) == ["srun"]
        assert Watched({}, launcher_search.find().listeners).gone() == ""
        watched = Watched({}, launcher_search.find().listeners)
        monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "192.0.2.1")  # on another machine
        assert launcher_search.find() == launcher_search.Found()
        monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    assert watched.gone() == "srun"
    assert launcher_search.find() == launcher_search.Found()


def test_a_variable_names_another_launcher(monkeypatch):
    host, own = socket.gethostname(), processes.process(os.getpid())
    for value, expected in ((f"{os.getpid()}@{host}", own), (str(os.getpid()), own), ("1@elsewhere", None)):
        monkeypatch.setenv(launcher_search.VARIABLE, value)
        assert (
            launcher_search.find().processes.get(launcher_search.VARIABLE) == expected
            and launcher_search.find().gone == []
        )
    monkeypatch.setenv(launcher_search.VARIABLE, f"{2**22}@{host}")
    assert launcher_search.find().gone == [launcher_search.VARIABLE]
    monkeypatch.setenv(launcher_search.VARIABLE, "me")
    with pytest.raises(ConfigError, match="PAUSE_MEGATRON_LAUNCHER_PID: expected PID or PID@HOST, got 'me'"):
        launcher_search.find()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv(launcher_search.VARIABLE, "0")
    assert launcher_search.find() == launcher_search.Found()


def test_a_reused_pid_is_another_process():
    assert processes.runs(processes.process(os.getpid()))
    assert not processes.runs(Process(os.getpid(), 1))
    ended = subprocess.Popen(["true"])
    wait_for(lambda: processes.process(ended.pid) is None)  # a zombie counts as exited
    ended.wait()


HOLDS_THE_INTERPRETER = "import ctypes; ctypes.PyDLL(None).sleep(60)"


class Rank:
    """A process that holds its GIL, a launcher, and a watcher in a thread of this process."""

    def __init__(self) -> None:
        self.launcher = subprocess.Popen(["sleep", "60"])
        self.process = subprocess.Popen([sys.executable, "-I", "-S", "-c", HOLDS_THE_INTERPRETER])
        self.channel, theirs = socket.socketpair()
        watched = Watched({"launcher": processes.process(self.launcher.pid)}, {})
        watcher = Watcher(processes.process(self.process.pid), "3", watched, theirs)
        self.thread = threading.Thread(target=watcher.run, daemon=True)
        self.thread.start()

    def seconds_until_it_ends(self, most: float = 20) -> float:
        began = time.monotonic()
        self.process.wait(most)
        self.thread.join(most)
        assert not self.thread.is_alive()
        return time.monotonic() - began


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    for process in (rank.launcher, rank.process):
        process.kill()
        process.wait()


def test_before_training_a_rank_ends_with_a_killed_launcher_only(rank):
    rank.launcher.send_signal(signal.SIGSTOP)
    time.sleep(3 * processes.LOOK_SECONDS)
    assert rank.process.poll() is None
    rank.launcher.kill()
    assert rank.seconds_until_it_ends() < 2 and rank.process.returncode == -signal.SIGKILL


def test_during_training_a_rank_is_stopped_and_has_time_to_save(rank, monkeypatch, capfd):
    monkeypatch.setattr(processes, "SAVE_SECONDS", 1.0)
    rank.channel.send(TAKING_STEPS)
    time.sleep(2 * processes.LOOK_SECONDS)
    rank.launcher.kill()
    assert rank.channel.recv(1) == GONE
    assert 0.8 < rank.seconds_until_it_ends() < 3  # although it holds the GIL
    error = capfd.readouterr().err
    assert f"[rank 3] the launcher has exited: launcher (process {rank.launcher.pid}); finishing the step" in error
    assert "[rank 3] still running 1 s after its launcher exited; killed" in error


def test_a_save_after_a_signal_has_more_time(rank, monkeypatch, capfd):
    monkeypatch.setattr(processes, "STOPPING_SECONDS", 1.5)
    monkeypatch.setattr(processes, "SAVE_SECONDS", 1.2)
    rank.channel.send(TAKING_STEPS)
    time.sleep(2 * processes.LOOK_SECONDS)
    rank.launcher.kill()
    assert rank.channel.recv(1) == GONE
    rank.channel.send(STOP_ASKED)  # Ctrl-C: the launcher may exit first
    assert 1.3 < rank.seconds_until_it_ends() < 4
    assert "the launcher has exited" not in capfd.readouterr().err  # who stopped it knows


def test_a_suspended_rank_ends_too_and_the_watcher_exits_with_it(rank):
    rank.process.send_signal(signal.SIGSTOP)
    rank.launcher.kill()
    assert rank.seconds_until_it_ends() < 2


def test_the_watcher_exits_with_its_process(rank):
    rank.process.kill()
    assert rank.seconds_until_it_ends() < 1


def test_a_closed_stderr_does_not_keep_a_rank_alive(rank, monkeypatch):
    """The message is lost, but the rank still ends."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(1 << 16))
    os.set_blocking(writing, True)
    before = os.dup(2)
    os.dup2(writing, 2)
    try:
        rank.launcher.kill()
        assert rank.seconds_until_it_ends() < 2
    finally:
        os.dup2(before, 2)
        for descriptor in (before, reading, writing):
            os.close(descriptor)
