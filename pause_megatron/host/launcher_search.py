"""What started a rank: torchrun, deepspeed, srun, mpirun, or the process that a variable names.

Only what is seen is watched, and only what has surely ended is said to be gone: a launcher may be another user's, on
another machine, or outside of the container that the rank is in.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pause_megatron.errors import ConfigError
from pause_megatron.host import job_step, processes
from pause_megatron.host.processes import Process

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
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish")
_ENDING_LOOKS = 100
# They take the children of those that have ended.
_OF_MACHINES = ("init", "systemd")
_FOSTER_PARENTS = (*_OF_MACHINES, "tini", "dumb-init", "docker-init", "catatonit")


@dataclass
class Found:
    """What was found about the launcher of this process.

    Attributes:
        processes: of the launcher, by name, to be watched.
        listeners: inodes of its listening sockets, by name, where it is no ancestor.
        gone: names of what is surely there no more already. What cannot be seen from here is not.
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
    ancestors = list(processes.ancestors())
    for name, marks in _MARKS.items():
        for mark in marks:
            if mark in env:
                _by_mark(name, f"{mark}={env[mark]}", ancestors, found)
                break
    _slurm(env, ancestors, found)
    return found


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
    if running is not None:
        found.processes[name] = running
    elif not processes.is_hidden(pid):
        found.gone.append(name)


def _by_mark(name: str, mark: str, ancestors: list[int], found: Found) -> None:
    """The nearest ancestor that has not this variable, or says on its command line what it is."""
    given = os.getpid()  # the furthest that the launcher's variable has got to
    for pid in ancestors:
        if not _says(pid, _WORDS[name]) and mark in processes.variables(pid):
            given = pid
            continue
        if _fosters(pid, name):
            # The daemons of MPI are many, and may be another user's: without one in sight nothing is known.
            if name != "mpirun" and _is_adopted(given, pid, leads=name == "torchrun"):
                found.gone.append(name)
        elif _program(pid) not in _SHELLS or _says(pid, _WORDS[name]):  # a shell: set by hand
            _watch(found, name, pid)
            if name == "deepspeed":
                _runner_of(pid, found)
        return


def _is_adopted(pid: int, by: int, *, leads: bool = False) -> bool:
    """Whether a process is surely no child of what fosters it, but of one that has ended.

    It may as well have been started in a container of its own, by the first process there (a shell, an init), and its
    launcher is outside.

    Args:
        leads: its launcher gives a session to each process that it starts, as torchrun does.
    """
    own, its = processes.stat(pid), processes.stat(by)
    if not own or not its:
        return False
    group, session = int(own[2]), int(own[3])  # 0: of a process outside
    if session not in (0, pid, int(its[3])):  # that of a process between the two
        return True
    of_machine = _program(by) in _OF_MACHINES or (by == 1 and processes.is_first_namespace())
    # An init of a container has the variables that the container was started with; where they can be read, it lacks
    # the launcher's (`_by_mark`).
    if not of_machine and not (_program(by) in _FOSTER_PARENTS and processes.variables(by)):
        return False
    leader_ended = group not in (0, pid) and processes.process(group) is None and not processes.is_hidden(group)
    return leader_ended or (leads and session == pid)


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
    if _fosters(parent, "deepspeed") and _is_adopted(pid, parent):
        found.gone.append("the deepspeed runner")
    elif running is not None and not processes.runs(running):  # it has ended while it was looked at
        _runner_of(pid, found)


def _slurm(env: Mapping[str, str], ancestors: list[int], found: Found) -> None:
    """srun is no ancestor: its tasks are children of slurmstepd, which lives on. Its port is known where it runs."""
    port, host = env.get("SLURM_STEP_LAUNCHER_PORT", ""), env.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if "SLURM_STEP_NUM_TASKS" not in env or not port.isdecimal() or not _is_here(host):
        return
    if job_step.is_inherited(env):
        return
    try:
        inode = processes.listening().get(int(port))
    except OSError:
        return
    if inode:
        found.listeners["srun"] = inode
        return
    # Where the step is not seen, the variables may be inherited.
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
