"""Two hosts on this machine: network namespaces joined by a bridge, each with its own addresses and host name.

Each has two interfaces. `live0` reaches the other host. `dead0` comes first and its address is the one that the host's
name leads to, but from the other host no packet arrives there, and none is answered: who chooses it waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NEW_NETWORK, _NEW_MOUNTS, _NEW_HOST_NAME = 0x40000000, 0x00020000, 0x04000000
_GATEWAY = "10.77.0.254"
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000


class NoNamespaces(Exception):
    """Why hosts cannot be made here."""


@dataclass(frozen=True)
class Host:
    """A host.

    Attributes:
        name: host name, in this host only
        namespace: of `ip netns`
        address: of live0
        dead_address: of dead0
        folder: of its hosts and resolv.conf, which stand in /etc there
    """

    name: str
    namespace: str
    address: str
    dead_address: str
    folder: Path

    def enter(self) -> None:
        """Moves this process, which has one thread, onto the host for good."""
        with open(f"/run/netns/{self.namespace}") as namespace:
            _call("setns", namespace.fileno(), _NEW_NETWORK)
        _call("unshare", _NEW_MOUNTS | _NEW_HOST_NAME)
        _call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
        for name in ("hosts", "resolv.conf"):
            mount_over(Path("/etc", name), self.folder / name)
        socket.sethostname(self.name)

    def vanish(self) -> None:
        """Take its link down: all packets to and from it are lost without an error."""
        _ip(f"-n {self.namespace} link set live0 down")

    def appear(self) -> None:
        """Its link is there again."""
        _ip(f"-n {self.namespace} link set live0 up")
        _ip(f"-n {self.namespace} route replace default via {_GATEWAY}")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Makes the hosts; at the end removes them, and ends what still runs there.

    Raises:
        NoNamespaces: not root, no `ip`, or a kernel without namespaces, veth or bridges.
    """
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise NoNamespaces("needs root and ip (Debian package iproute2)")
    switch = f"hosts{os.getpid()}-switch"
    hosts = [
        Host(name, f"hosts{os.getpid()}-{name}", f"10.77.0.{i}", f"10.99.{i}.1", folder / name)
        for i, name in enumerate(("host-a", "host-b"), start=1)
    ]
    try:
        _ip(f"netns add {switch}")
        # The default route of both hosts leads here, and what is not for the bridge itself is dropped in silence.
        _ip(f"netns exec {switch} sh -c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
        _ip(f"-n {switch} link add bridge type bridge")
        _ip(f"-n {switch} addr add {_GATEWAY}/24 dev bridge")
        _ip(f"-n {switch} link set bridge up")
        for host in hosts:
            _connect(host, switch)
            host.folder.mkdir()
            names = "".join(f"{other.address} {other.name}-live\n" for other in hosts)
            (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{host.dead_address} {host.name}\n{names}")
            (host.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # no server: an immediate error
        yield tuple(hosts)
    finally:
        for namespace in (*(host.namespace for host in hosts), switch):
            _remove(namespace)


@contextlib.contextmanager
def own_host_name(name: str) -> Iterator[None]:
    """For this thread, while the body runs. Needs root."""
    with open("/proc/thread-self/ns/uts") as before:
        _call("unshare", _NEW_HOST_NAME)
        try:
            socket.sethostname(name)
            yield
        finally:
            _call("setns", before.fileno(), _NEW_HOST_NAME)


def mount_over(place: Path, source: Path) -> None:
    """Where a process has entered a host: a file that stands there for another one."""
    _call("mount", str(source).encode(), str(place).encode(), None, _BIND, None)


def _connect(host: Host, switch: str) -> None:
    own, port = f"-n {host.namespace}", f"{host.name}-port"
    _ip(f"netns add {host.namespace}")
    _ip(f"{own} link set lo up")
    _ip(f"{own} link add dead0 type veth peer name dead1 netns {switch}")
    _ip(f"-n {switch} link set dead1 name {host.name}-dead up")
    _ip(f"{own} link add live0 type veth peer name {port} netns {switch}")
    _ip(f"-n {switch} link set {port} master bridge up")
    for interface, address in (("dead0", host.dead_address), ("live0", host.address)):
        _ip(f"{own} addr add {address}/24 dev {interface}")
        _ip(f"{own} link set {interface} up")
    _ip(f"{own} route add default via {_GATEWAY}")


def _remove(namespace: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)  # and its interfaces


def _ip(command: str, *more: str) -> None:
    done = subprocess.run(["ip", *command.split(), *more], capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(f"ip {command}: {done.stderr.strip()}")


def _call(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
