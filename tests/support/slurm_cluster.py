"""A real SLURM cluster on this machine, for tests: munge, one slurmctld, two slurmd on 127.0.0.1, all in one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
MaxNodeCount=8
MinJobAge=300
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=4
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 MaxTime=9:00 State=UP
"""


def installed() -> bool:
    """Whether the Debian packages slurm-wlm and munge are there, and this user may start them."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return all(shutil.which(program, path=path) for program in PROGRAMS) and os.geteuid() == 0


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        folder: its files and logs. environment: variables that make SLURM's commands talk to it.
    """

    folder: Path
    environment: dict[str, str]

    @property
    def config(self) -> Path:
        """slurm.conf."""
        return self.folder / "slurm.conf"

    def ending(self, job: str) -> list[str]:
        """What slurmd still keeps of the steps of a job, on both nodes; gone when the last of their processes is."""
        return [path.name for path in self.folder.glob(f"spool-*/*_{job}.*")]

    def run(self, *command: str) -> str:
        """What one of SLURM's commands prints.

        Raises:
            AssertionError: it fails.
        """
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def wait_until_idle(self, seconds: float = 120) -> None:
        """Wait until no job is pending or running.

        Raises:
            AssertionError: some still are.
        """
        deadline = time.monotonic() + seconds
        while True:
            lines = self.run("squeue", "--noheader", "--states=all", "--format=%T %i %j %r").splitlines()
            # A job that is being requeued is neither pending nor running for a moment.
            if not (left := [line for line in lines if line.split()[0] not in ENDED]):
                return
            assert time.monotonic() < deadline, f"{left}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster of two nodes of 4 CPUs in a folder; stop it at the end, with what runs on it."""
    ports = _free_ports(3)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), user=_user(), folder=folder, ports=ports))
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    cluster = Cluster(folder, {"SLURM_CONF": str(config), "PATH": path})
    with contextlib.ExitStack() as running:
        munge = [
            "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key",
        ]
        munge += [
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        ]
        _start(running, cluster, munge)
        _wait(lambda: (folder / "munge.socket").exists(), cluster)
        _start(running, cluster, ["slurmctld", "-D", "-f", str(config)])
        for node in ("n1", "n2"):
            _start(running, cluster, ["slurmd", "-D", "-N", node, "-f", str(config)])
        _wait(lambda: _ready(cluster), cluster)
        try:
            yield cluster
        finally:
            environment = {**os.environ, **cluster.environment}
            subprocess.run(["scancel", f"--user={_user()}"], env=environment, capture_output=True)
            with contextlib.suppress(AssertionError):
                cluster.wait_until_idle(20)


def _ready(cluster: Cluster) -> bool:
    environment = {**os.environ, **cluster.environment}
    command = ["sinfo", "--noheader", "--format=%D %t"]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split() == ["2", "idle"]


def _start(running: contextlib.ExitStack, cluster: Cluster, command: list[str]) -> None:
    """Start a daemon in the foreground of a process of its own; it is ended when the stack is."""
    environment = {**os.environ, **cluster.environment}
    log = running.enter_context((cluster.folder / "daemons.log").open("ab"))
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    running.callback(end)


def _wait(condition, cluster: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the cluster did not come up\n{cluster.logs()}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
