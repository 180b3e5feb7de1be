"""Search for the launcher of a rank: torchrun, deepspeed, srun, mpirun, or the process that a variable names.

Only visible processes are watched, and only processes that have certainly ended count as gone. A launcher may be
another user's, on another host, or outside of the rank's container.
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

# Variables that a launcher sets for its children, and does not have itself.
_VARIABLES = {
    "torchrun": ("TORCHELASTIC_RUN_ID",),
    "deepspeed": ("CROSS_RANK",),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
}
# Names on its command line; a launcher that is itself a rank's child has the variables, too.
_COMMANDS = {
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
_ENDING_RETRIES = 100
# Init processes adopt the children of processes that have ended.
_HOST_INITS = ("init", "systemd")
_INITS = (*_HOST_INITS, "tini", "dumb-init", "docker-init", "catatonit")


@dataclass
class Found:
    """Result of the search for this process's launcher.

    Attributes:
        processes: Launcher processes to watch, by name.
        listeners: Inodes of the launcher's listening sockets, by name, where it is no ancestor.
        gone: Names of launcher processes that have certainly ended. Invisible ones do not count.
    """

    processes: dict[str, Process] = field(default_factory=dict)
    listeners: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


def find(environment: Mapping[str, str] | None = None) -> Found:
    """Find the launcher processes of this process; empty for a process without a launcher.

    Args:
        environment: Environment variables; default: os.environ.

    Raises:
        ConfigError: PAUSE_MEGATRON_LAUNCHER_PID is no process number.
    """
    env, found = os.environ if environment is None else environment, Found()
    if not processes.machine() or env.get(VARIABLE) == "0":
        return found
    _named(env, found)
    ancestors = list(processes.ancestors())
    for name, variables in _VARIABLES.items():
        for variable in variables:
            if variable in env:
                _by_variable(name, f"{variable}={env[variable]}", ancestors, found)
                break
    _slurm(env, ancestors, found)
    return found


def _named(env: Mapping[str, str], found: Found) -> None:
    """Watch the process that VARIABLE names, as PID, or as PID@HOST where other hosts may inherit the variable."""
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


def _by_variable(name: str, variable: str, ancestors: list[int], found: Found) -> None:
    """Watch the nearest ancestor that lacks this variable, or whose command line names the launcher."""
    topmost = os.getpid()  # the last ancestor that has the launcher's variable
    for pid in ancestors:
        if not _runs_command(pid, _COMMANDS[name]) and variable in processes.variables(pid):
            topmost = pid
            continue
        if _is_init(pid, name):
            # MPI has several kinds of daemons, maybe another user's: without a visible one nothing is known.
            if name != "mpirun" and _is_adopted(topmost, pid, leads=name == "torchrun"):
                found.gone.append(name)
        elif _program(pid) not in _SHELLS or _runs_command(pid, _COMMANDS[name]):  # in a shell it was set by hand
            _watch(found, name, pid)
            if name == "deepspeed":
                _runner_of(pid, found)
        return


def _is_adopted(pid: int, by: int, *, leads: bool = False) -> bool:
    """Return whether an init process has certainly adopted a process, whose parent has ended.

    Otherwise the first process of a container (a shell, an init) may have started it, and its launcher is outside.

    Args:
        pid: The process.
        by: Its parent.
        leads: Whether its launcher starts each process in a session of its own, as torchrun does.
    """
    own, parent = processes.stat(pid), processes.stat(by)
    if not own or not parent:
        return False
    group, session = int(own[2]), int(own[3])  # 0: of a process outside of the container
    if session not in (0, pid, int(parent[3])):  # the session of a process between the two
        return True
    host_init = _program(by) in _HOST_INITS or (by == 1 and processes.is_first_namespace())
    # A container's init has the variables that the container was started with. Where they can be read, it lacks the
    # launcher's (`_by_variable`).
    if not host_init and not (_program(by) in _INITS and processes.variables(by)):
        return False
    leader_ended = group not in (0, pid) and processes.process(group) is None and not processes.is_hidden(group)
    return leader_ended or (leads and session == pid)


def _runner_of(pid: int, found: Found) -> None:
    """Watch the parent of DeepSpeed's launcher on this host: the runner, or a remote shell."""
    for _ in range(_ENDING_RETRIES):
        parent = processes.parent(pid)
        if not parent or processes.words(parent):
            break
        time.sleep(0.005)  # it is ending and will be replaced, or it is hidden
    running = processes.process(parent)
    if _runs_command(parent, _RUNNER):
        _watch(found, "the deepspeed runner", parent)
        return
    remote = parent
    if _program(parent) in _SHELLS and "deepspeed.launcher.launch" in " ".join(processes.words(parent)):
        remote = processes.parent(parent)
    if _program(remote) in _REMOTE:
        _watch(found, "the deepspeed runner's connection", remote)
        return
    if _is_init(parent, "deepspeed") and _is_adopted(pid, parent):
        found.gone.append("the deepspeed runner")
    elif running is not None and not processes.runs(running):  # it has ended meanwhile
        _runner_of(pid, found)


def _slurm(env: Mapping[str, str], ancestors: list[int], found: Found) -> None:
    """Watch srun by its listening port: it is no ancestor, since its tasks are children of slurmstepd."""
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
    # Where the step is not known, the variables may be inherited.
    step = f"[{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}]"
    if any(processes.words(pid)[:1] and f"slurmstepd: {step}" in processes.words(pid)[0] for pid in ancestors):
        found.gone.append("srun")


def _is_here(address: str) -> bool:
    """Return whether an address is one of this host's, without sending anything."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
            return bool(address)
    return False


def _program(pid: int) -> str:
    """Return the program name of a process, from its command line or title: 'sshd: user@notty' -> 'sshd'."""
    first = [*processes.words(pid), ""][0]
    return Path(first.split(":")[0]).name.lstrip("-")


def _runs_command(pid: int, names: tuple[str, ...]) -> bool:
    """Return whether a process runs one of these programs, scripts or modules."""
    command = processes.words(pid)
    if not command:
        return False
    first = [word for word in command[1:] if not word.startswith("-")][:1]
    modules = [command[at + 1] for at, word in enumerate(command[:-1]) if word == "-m"][:1]
    return not {Path(command[0]).name, *(Path(word).name for word in first), *modules}.isdisjoint(names)


def _is_init(pid: int, name: str) -> bool:
    """Return whether a process is an init process, which adopts children, and not the launcher."""
    first = _program(pid)
    return (pid == 1 or first in _INITS) and "python" not in first and not _runs_command(pid, _COMMANDS[name])
