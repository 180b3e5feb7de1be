"""Addresses of rank 0's store, and the error for a taken port."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pause_megatron.distributed import store
from pause_megatron.distributed.interfaces import interfaces
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.distributed.store import open_store, own_addresses
from pause_megatron.errors import ConfigError


def listening(port: int) -> set[str]:
    """Return the listening addresses of this machine, from the kernel's table."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                size = 4 if name == "tcp" else 16
                # Words of 32 bits in the machine's own order.
                raw = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, 2 * size, 8))
                found.add(socket.inet_ntop(socket.AF_INET if size == 4 else socket.AF_INET6, raw))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outside() -> str:
    """Return an address of this machine that others may reach; loopback without one."""
    return next((address for address in interfaces().values() if not address.startswith("127.")), "127.0.0.1")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "outside"])
def test_the_store_listens_only_at_the_address_of_master_addr(name):
    address, port = outside() if name == "outside" else name, free_port()
    kept = open_store(Ranks(0, 0, 2, address, port, "environment"), 10)
    expected = {found for _, found in own_addresses(address)[:1]}
    assert expected and listening(port) == expected
    other = open_store(Ranks(1, 1, 2, address, port, "environment"), 10)
    other.set("a", "b")
    assert kept.get("a") == b"b"


def test_a_name_that_is_not_this_host_s_listens_on_all_interfaces(monkeypatch):
    """Behind NAT, or where /etc/hosts resolves this host to 127.0.1.1, other hosts use another address."""
    names = {"translated": "192.0.2.7", "debian": "127.0.1.1"}
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: known(names.get(host, host), *rest, **more))
    assert own_addresses("translated") == own_addresses("debian") == []
    assert [address for _, address in own_addresses("127.0.1.1")] == ["127.0.1.1"]
    listener = store._listener("debian", port := free_port())
    assert listening(port) <= {"0.0.0.0", "::"} and listening(port)
    listener.close()


def test_a_taken_port_names_the_variable_that_sets_another():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = rf"MASTER_ADDR=127.0.0.1, port {port}, on .* a free port for rank 0 .*: MASTER_PORT, torchrun"
        with pytest.raises(ConfigError, match=said):
            open_store(Ranks(0, 0, 2, "127.0.0.1", port, "environment"), 1)


@pytest.mark.parametrize(
    ("address", "rank"),
    [*((name, rank) for name in ("nosuchhost.invalid", "192.0.2.1", "no..host") for rank in (0, 1)), ("127.0.0.1", 1)],
)
def test_an_unanswered_address_is_one_error_and_leaves_no_thread(address, rank):
    port = free_port()
    said = rf"MASTER_ADDR={address} \(.*\), port {port}: expected rank 0 to answer within 0.3 s \(run.connect_seconds\)"
    with pytest.raises(ConfigError, match=said):
        open_store(Ranks(rank, rank, 2, address, port, "environment"), 0.3)
    assert not store.is_connecting() and not listening(port)


PROGRAM = """
import sys
from pause_megatron import cli
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.distributed.store import is_connecting, open_store

def run(arguments):
    try:
        open_store(Ranks(1, 1, 2, "127.0.0.1", int(arguments[0]), "environment"), 0.2)
    finally:
        print("connecting" if is_connecting() else "", flush=True)

cli._dispatch = run
sys.exit(cli.main())
"""


def test_a_program_that_is_no_store_is_one_message_with_its_code():
    """A thread is inside torch, and would abort the process if it returned during interpreter shutdown."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def keep() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])

        threading.Thread(target=keep, daemon=True).start()
        command = [sys.executable, "-c", PROGRAM, str(listener.getsockname()[1])]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = done.stdout.readline()
        listener.shutdown(socket.SHUT_RDWR)
        for connection in accepted:
            connection.close()
        text = done.communicate(timeout=60)[1]
    assert (done.returncode, said) == (2, "connecting\n"), text
    assert "run.connect_seconds" in text and "terminate called" not in text
