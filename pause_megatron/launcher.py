"""A rank ends with what started it: torchrun, deepspeed, srun, mpirun, or the process that a variable names.

Ranks outlive a launcher that is killed: torchrun gives them sessions of their own, DeepSpeed's runner starts a launcher
that starts the ranks, under SLURM they are children of a daemon. They would then wait for each other, or go on with
nobody to stop them, and keep the run folder. So a small process (`pause_megatron.processes`) watches for each rank.

What started a rank is not taken for its launcher without a sign: a run that is put into the background of a shell goes
on when the shell ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pause_megatron import processes
from pause_megatron.errors import ConfigError
from pause_megatron.processes import GONE, STOP_ASKED, TAKING_STEPS, Process, Watched

VARIABLE = "PAUSE_MEGATRON_LAUNCHER_PID"

# What a launcher gives its children, and has not itself.
_MARKS = {
    "torchrun": ("TORCHELASTIC_RUN_ID",),
    "deepspeed": ("CROSS_RANK",),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
}
# What its command line may say; a launcher that is a rank's child has the marks as well.
_WORDS = {
    "torchrun": (
        "torchrun",
        "torch.distributed.run",
        "torch.distributed.launch",
        "pause_megatron.distributed.torchrun",
    ),
    "deepspeed": ("deepspeed.launcher.launch",),
    "mpirun": ("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orted", "prted", "prterun"),
}
_RUNNER = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
_REMOTE = ("sshd", "sshd-session")
_SHELLS = ("sh", "bash", "dash")
_ENDING_LOOKS = 100
# They take the children of those that have ended.
_FOSTER_PARENTS = ("init", "systemd", "tini", "dumb-init", "docker-init", "catatonit")


@dataclass
class Found:
    """What was found about the launcher of this process.

    Attributes:
        processes: of the launcher, by name, to be watched.
        listeners: inodes of its listening sockets, by name, where it is no ancestor.
        gone: names of what is there no more already.
    """

    processes: dict[str, Process] = field(default_factory=dict)
    listeners: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


def find(environment: Mapping[str, str] | None = None) -> Found:
    """Which processes must stay for this one to go on; nothing for a process that no launcher started.

    Args:
        environment: defaults to os.environ.

    Raises:
        ConfigError: PAUSE_MEGATRON_LAUNCHER_PID is no process number.
    """
    env, found = os.environ if environment is None else environment, Found()
    if not processes.machine() or env.get(VARIABLE) == "0":
        return found
    _named(env, found)
    ancestors = list(_ancestors())
    for name, marks in _MARKS.items():
        for mark in marks:
            if mark in env:
                _by_mark(name, f"{mark}={env[mark]}", ancestors, found)
                break
    _slurm(env, ancestors, found)
    return found


def _ancestors() -> Iterator[int]:
    """Numbers of the parent, of its parent and so on."""
    pid = os.getppid()
    while pid:
        yield pid
        pid = processes.parent(pid)


def _named(env: Mapping[str, str], found: Found) -> None:
    """The process that the variable names, as PID or, where the variable may get to other machines, as PID@HOST."""
    number, _, host = env.get(VARIABLE, "").partition("@")
    if not number or host not in ("", socket.gethostname(), processes.machine()):
        return
    if not number.isdecimal():
        raise ConfigError(f"environment variable {VARIABLE}: expected PID or PID@HOST, got {env[VARIABLE]!r}")
    _watch(found, VARIABLE, int(number))


def _watch(found: Found, name: str, pid: int) -> None:
    running = processes.process(pid)
    if running is None:
        found.gone.append(name)
    else:
        found.processes[name] = running


def _by_mark(name: str, mark: str, ancestors: list[int], found: Found) -> None:
    """The nearest ancestor that has not this variable, or says on its command line what it is."""
    for pid in ancestors:
        if not _says(pid, _WORDS[name]) and mark in processes.variables(pid):
            continue
        if _fosters(pid, name):
            break
        _watch(found, name, pid)
        if name == "deepspeed":
            _runner_of(pid, found)
        return
    found.gone.append(name)


def _runner_of(pid: int, found: Found) -> None:
    """What started DeepSpeed's launcher of this machine: its runner, or a remote shell."""
    for _ in range(_ENDING_LOOKS):
        parent = processes.parent(pid)
        if not parent or processes.words(parent):
            break
        time.sleep(0.005)  # it is just ending, and another one follows it; or it may not be looked at
    running = processes.process(parent)
    if _says(parent, _RUNNER):
        _watch(found, "the deepspeed runner", parent)
        return
    remote = parent
    if _program(parent) in _SHELLS and "deepspeed.launcher.launch" in " ".join(processes.words(parent)):
        remote = processes.parent(parent)
    if _program(remote) in _REMOTE:
        _watch(found, "the deepspeed runner's connection", remote)
        return
    fields = processes.stat(pid)
    # A shell or a service makes a process group of what it starts; a runner does not, so this one was orphaned.
    if _fosters(parent, "deepspeed") and fields and int(fields[2]) != pid:
        found.gone.append("the deepspeed runner")
    elif running is not None and not processes.runs(running):  # it has ended while it was looked at
        _runner_of(pid, found)


def _slurm(env: Mapping[str, str], ancestors: list[int], found: Found) -> None:
    """srun is no ancestor: its tasks are children of slurmstepd, which lives on. Its port is known where it runs."""
    port, host = env.get("SLURM_STEP_LAUNCHER_PORT", ""), env.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if "SLURM_STEP_NUM_TASKS" not in env or not port.isdecimal() or not _is_here(host):
        return
    if inode := processes.listening().get(int(port)):
        found.listeners["srun"] = inode
        return
    # These variables are inherited by jobs that are submitted from a step: the daemon says whether it is this step.
    step = f"[{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}]"
    if any(processes.words(pid)[:1] and f"slurmstepd: {step}" in processes.words(pid)[0] for pid in ancestors):
        found.gone.append("srun")


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's. Nothing is sent."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
            return bool(address)
    return False


def _program(pid: int) -> str:
    """Name of a process as the kernel has it, or the first word of its title: 'sshd: user@notty' -> 'sshd'."""
    first = [*processes.words(pid), ""][0]
    return Path(first.split(":")[0]).name.lstrip("-")


def _says(pid: int, names: tuple[str, ...]) -> bool:
    """Whether one of the names is the program, the script that an interpreter runs, or the module."""
    command = processes.words(pid)
    if not command:
        return False
    first = [word for word in command[1:] if not word.startswith("-")][:1]
    modules = [command[at + 1] for at, word in enumerate(command[:-1]) if word == "-m"][:1]
    return not {Path(command[0]).name, *(Path(word).name for word in first), *modules}.isdisjoint(names)


def _fosters(pid: int, name: str) -> bool:
    """Whether a process is no launcher, but one that has taken this one over from a launcher that has ended."""
    first = _program(pid)
    return (pid == 1 or first in _FOSTER_PARENTS) and "python" not in first and not _says(pid, _WORDS[name])


class _Watch:
    """This process's end of the channel to its watcher; says nothing where there is none."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process = None
        self._gone = False

        self.watched = Watched({}, {})

    def begin(self) -> None:
        if self._channel is not None or not sys.executable:
            return
        found = find()
        if found.gone:
            print(f"pause-megatron: its launcher is gone: {', '.join(found.gone)}; ended", file=sys.stderr, flush=True)
            os._exit(1)
        if not found.processes and not found.listeners:
            return
        try:
            self._start(Watched(found.processes, found.listeners))
        except OSError as error:
            print(f"warning: this process is not ended with its launcher: {error}", file=sys.stderr, flush=True)

    def _start(self, watched: Watched) -> None:
        import subprocess

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            arguments = processes.watcher_arguments(watched, theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", processes.__file__, *arguments],
                # None of the rank's variables, by which it would be taken for a rank.
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        self._channel, self.watched = ours, watched

    def tell(self, what: bytes) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it was ended by somebody
                self._channel.send(what)

    def gone(self) -> bool:
        if self._channel is not None and not self._gone:
            with contextlib.suppress(OSError):
                self._gone = GONE in self._channel.recv(16)
        return self._gone


_own = _Watch()


def end_with_launcher() -> None:
    """From now on this process ends when its launcher does: at once, as long as it takes no steps.

    Called first of all, as what is imported next may take minutes. Nothing happens to a process without a launcher.

    Raises:
        ConfigError: see `find`.
    """
    _own.begin()


def taking_steps() -> None:
    """From now on this process has something to lose: it is asked to stop (`gone`), and ended some seconds later."""
    _own.tell(TAKING_STEPS)


def stop_was_asked() -> None:
    """A signal has asked for a stop; should the launcher have gone with it, the save has more time. For handlers."""
    _own.tell(STOP_ASKED)


def gone() -> bool:
    """Whether the launcher has ended. Does not wait."""
    return _own.gone()


def left(code: int) -> int:
    """End this process with its exit code if its launcher has ended, when there is nothing more to do; else the code.

    torchrun's store lives in torchrun. What torch has open there is given up when the interpreter ends, and then takes
    longer than this process may live.
    """
    if gone():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def own_name() -> str:
    """The value of PAUSE_MEGATRON_LAUNCHER_PID for processes that shall end with this one."""
    return f"{os.getpid()}@{processes.machine()}"


def watched() -> Watched:
    """What must stay for this process to go on; empty for one that no launcher started, or that is not watched."""
    return _own.watched
