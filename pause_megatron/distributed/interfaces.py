"""Which of a host's addresses gloo or NCCL will use to reach the other ranks. No torch.

A host has several, and the libraries choose one without asking: gloo that of the host name, NCCL that of the first
interface. A site says which one is right (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); nothing here sets them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from pause_megatron.errors import ConfigError

VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


@dataclass(frozen=True)
class Endpoint:
    """Where the other ranks will look for this one.

    Attributes:
        address: IPv4
        interface: that has it; "" when none is known
        reason: what made the library choose it
    """

    address: str
    interface: str
    reason: str

    def __str__(self) -> str:
        return f"{self.address} ({self.interface or 'no interface'}, {self.reason})"


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of every interface that has one, in the system's order."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def own_endpoint(backend: str, environment: Mapping[str, str] | None = None) -> Endpoint | None:
    """The address that a backend will take on this host; None where that cannot be told (IPv6 only).

    Args:
        backend: "gloo" or "nccl"
        environment: default: os.environ

    Raises:
        ConfigError: the variable of the backend names no interface of this host.
    """
    given = (os.environ if environment is None else environment).get(VARIABLES[backend], "")
    if not given:
        return _of_host_name() if backend == "gloo" else _first_for_nccl()
    names = [name for _, name in socket.if_nameindex()]
    chosen = _named(names, given) if backend == "nccl" else [name for name in names if name == given.split(",")[0]]
    if not chosen:
        raise ConfigError(
            f"{VARIABLES[backend]}={given}: expected an interface of {socket.gethostname()}, one of {', '.join(names)}"
        )
    return _first(chosen, f"{VARIABLES[backend]}={given}")


def interface_towards(address: str) -> str:
    """Name of the interface by which packets to a host name or IPv4 address leave; "" when none is known."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # nothing is sent
        return _interface_of(probe.getsockname()[0])
    return ""


def listed(found: Mapping[str, str]) -> str:
    """Interfaces and their addresses, for a message."""
    return ", ".join(f"{name} {address}" for name, address in found.items())


def _of_host_name() -> Endpoint | None:
    """gloo: the first address of the host name that is one of this host's, else loopback."""
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return Endpoint("127.0.0.1", _interface_of("127.0.0.1"), f"the host name {name} leads nowhere")
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            if family != socket.AF_INET:
                return None
            return Endpoint(address[0], _interface_of(address[0]), f"the address of the host name {name}")
    return Endpoint("127.0.0.1", _interface_of("127.0.0.1"), f"the host name {name} leads to another host")


def _first_for_nccl() -> Endpoint | None:
    """NCCL: the first whose name begins with ib; else the first that is neither docker's nor loopback; else any."""
    names = list(interfaces())
    outside = [name for name in names if not name.startswith(("docker", "lo"))]
    chosen = [name for name in names if name.startswith("ib")] or outside or names
    return _first(chosen, "the first that NCCL finds")


def _named(names: list[str], given: str) -> list[str]:
    """NCCL: prefixes with commas between; `=` before them: whole names; `^` before them: all others."""
    exact, other = "=" in given[:2], given.startswith("^")
    patterns = given.lstrip("^=").split(",")

    def matches(name: str) -> bool:
        return name in patterns if exact else name.startswith(tuple(patterns))

    return [name for name in names if matches(name) != other]


def _first(names: list[str], reason: str) -> Endpoint | None:
    addresses = interfaces()
    return next((Endpoint(addresses[name], name, reason) for name in names if name in addresses), None)


def _interface_of(address: str) -> str:
    return next((name for name, own in interfaces().items() if own == address), "")
