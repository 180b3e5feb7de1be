"""Network interfaces: which of a host's addresses gloo or NCCL will use to reach the other ranks.

By default gloo uses the address of the host name, and NCCL the first interface. GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME choose another one; nothing here sets them.
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
    """The address that a backend announces to the other ranks.

    Attributes:
        address: IPv4 address.
        interface: Name of its interface; "": not known.
        reason: Why the backend chooses it.
    """

    address: str
    interface: str
    reason: str

    def __str__(self) -> str:
        return f"{self.address} ({self.interface or 'no interface'}, {self.reason})"


def interfaces() -> dict[str, str]:
    """Return name -> IPv4 address of every interface that has one, in the system's order."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def own_endpoint(backend: str, environment: Mapping[str, str] | None = None) -> Endpoint | None:
    """Return the address that a backend will use on this host; None where it is not known (IPv6 only).

    Args:
        backend: "gloo" or "nccl".
        environment: Environment variables; default: os.environ.

    Raises:
        ConfigError: The backend's variable names no interface of this host.
    """
    given = (os.environ if environment is None else environment).get(VARIABLES[backend], "")
    if not given:
        return _of_host_name() if backend == "gloo" else _first_for_nccl()
    names = [name for _, name in socket.if_nameindex()]
    chosen = _named(names, given) if backend == "nccl" else [name for name in names if name == given.split(",")[0]]
    if not chosen:
        raise ConfigError(
            f"{VARIABLES[backend]}={given}: expected one of {', '.join(names)} (the interfaces of "
            f"{socket.gethostname()}), got {given!r}"
        )
    return _first(chosen, f"{VARIABLES[backend]}={given}")


def interface_towards(address: str) -> str:
    """Return the interface through which packets to an address leave; "": not known.

    Args:
        address: Host name or IPv4 address.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # nothing is sent
        return _interface_of(probe.getsockname()[0])
    return ""


def listed(found: Mapping[str, str]) -> str:
    """Return interfaces and their addresses as text, for a message.

    Args:
        found: Name -> IPv4 address.
    """
    return ", ".join(f"{name} {address}" for name, address in found.items())


def _of_host_name() -> Endpoint | None:
    """Return gloo's choice: the first address of the host name that is one of this host's, else loopback."""
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return Endpoint("127.0.0.1", _interface_of("127.0.0.1"), f"the host name {name} does not resolve")
    for family, kind, protocol, _, sockaddr in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(sockaddr)
            if family != socket.AF_INET:
                return None
            address = str(sockaddr[0])
            return Endpoint(address, _interface_of(address), f"the address of the host name {name}")
    return Endpoint("127.0.0.1", _interface_of("127.0.0.1"), f"the host name {name} resolves to another host")


def _first_for_nccl() -> Endpoint | None:
    """Return NCCL's choice: the first interface named ib*, else the first that is not docker* or lo*, else any."""
    names = list(interfaces())
    outside = [name for name in names if not name.startswith(("docker", "lo"))]
    chosen = [name for name in names if name.startswith("ib")] or outside or names
    return _first(chosen, "the first that NCCL finds")


def _named(names: list[str], given: str) -> list[str]:
    """Return the names that NCCL_SOCKET_IFNAME selects: prefixes, with `=` whole names, with `^` all others."""
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
