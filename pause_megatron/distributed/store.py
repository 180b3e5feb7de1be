"""The key-value store at MASTER_ADDR, through which ranks exchange their first messages.

Rank 0 serves it, unless torchrun's agent does. Any process that reaches its port may read and write it, since torch has
no authentication there. So it listens only at MASTER_ADDR's own address, where that is an address of rank 0's host.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from pause_megatron.distributed.interfaces import interfaces, listed
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import ConfigError

_THREAD = "connect to MASTER_ADDR"
_ANSWER_SECONDS = 1.5  # for a store that listens
_CONNECT_SECONDS = 10.0  # for one of a name's addresses to accept a connection


def open_store(ranks: Ranks, seconds: float) -> Store:
    """Open the store on rank 0, connect to it on the others. Waits only for rank 0.

    Args:
        ranks: Rank, world size and MASTER_ADDR of this process.
        seconds: Timeout for rank 0 to listen.

    Raises:
        ConfigError: No answer at MASTER_ADDR, or rank 0 cannot listen there.
    """
    wait = timedelta(seconds=seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store outlives a restart of the ranks.
        prefix = f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        return PrefixStore(prefix, _connected(ranks, wait))
    if ranks.rank:
        return _connected(ranks, wait)
    try:
        listener = _listener(ranks.master_addr, ranks.master_port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and (other := _other_store(ranks)) is not None:
            return other
        raise ConfigError(_cannot_listen(ranks, error)) from None
    return _connected(ranks, wait, listener)  # rank 0 is a client of its own store


def is_connecting() -> bool:
    """Return whether a thread is still inside torch's connect, which may abort the process at exit."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def own_addresses(name: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return family and address of this host's own addresses among those that a name resolves to.

    Args:
        name: A host name or address.

    Returns:
        Empty where none is this host's, or where the name resolves to a loopback address (`127.0.1.1 HOST` in
        /etc/hosts), which other hosts do not reach.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: not a valid host name
        return []
    loopback = name == "localhost" or name.startswith("127.") or name == "::1"
    own: list[tuple[socket.AddressFamily, str]] = []
    for family, kind, protocol, _, (host, _port, *scope) in found:
        address = str(host)
        if not loopback and (address.startswith("127.") or address == "::1"):
            return []
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address, 0, *scope))
            except OSError:
                continue
        own.append((family, address))
    return own


def _listener(name: str, port: int) -> socket.socket:
    """Listen on MASTER_ADDR's own address, or on all where it is none of this host's (address translation)."""
    for family, address in own_addresses(name)[:1]:
        return socket.create_server((address, port), family=family, backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=4096)


def _connected(ranks: Ranks, wait: timedelta, listener: socket.socket | None = None) -> Store:
    """Connect to the store, once its port accepts connections; serve it on the listener, if one is given.

    torch connects in a thread, since it waits without a timeout for a program that listens and does not answer. The
    thread starts only once the port accepts connections, because it is hard to end (see `is_connecting`).

    Raises:
        ConfigError: No answer, or an answer of another program.
    """
    outcome: list[Store | Exception] = []
    port = ranks.master_port if listener is None else listener.getsockname()[1]
    if (error := _connection_error(ranks.master_addr, port, wait.total_seconds())) is not None:
        if listener is not None:
            listener.close()
        raise ConfigError(_no_answer(ranks, wait.total_seconds(), error))

    def connect() -> None:
        descriptor = None if listener is None else listener.detach()
        try:
            store = TCPStore(
                ranks.master_addr,
                port,
                ranks.world_size,
                is_master=descriptor is not None,
                timeout=wait,
                wait_for_workers=False,
                master_listen_fd=descriptor,
            )
        except DistError as failure:
            outcome.append(failure)
        else:
            outcome.append(store)

    thread = threading.Thread(target=connect, name=_THREAD, daemon=True)
    thread.start()
    thread.join(wait.total_seconds() + _ANSWER_SECONDS)
    if outcome and isinstance(outcome[0], Store):
        return outcome[0]
    reason = outcome[0] if outcome else "it accepts connections, and is no store of torch's"
    raise ConfigError(_no_answer(ranks, wait.total_seconds(), reason))


def _connection_error(name: str, port: int, seconds: float) -> Exception | None:
    """Return why a port accepts no connection within a time; None as soon as it accepts one."""
    end, pause = time.monotonic() + seconds, 0.02
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((name, port), timeout=min(max(left, 0.1), _CONNECT_SECONDS)):
                return None
        except (OSError, UnicodeError) as error:
            if left < pause:
                return error
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _other_store(ranks: Ranks) -> Store | None:
    """Return the store of another process that is rank 0, too; None: another program listens on the port."""
    try:
        return _connected(ranks, timedelta(seconds=_ANSWER_SECONDS))
    except ConfigError:
        return None


def _cannot_listen(ranks: Ranks, error: OSError) -> str:
    where = f"MASTER_ADDR={ranks.master_addr}, port {ranks.master_port}, on {socket.gethostname()}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where}: expected a free port for rank 0 to listen on, got one that another program listens on. Give "
            "this run another one: MASTER_PORT, torchrun --master-port, or deepspeed --master_port"
        )
    return (
        f"{where}: rank 0 cannot listen there: {error.strerror}. Choose another port: MASTER_PORT, torchrun "
        "--master-port, or deepspeed --master_port"
    )


def _no_answer(ranks: Ranks, seconds: float, error: object) -> str:
    address = ranks.master_addr
    try:
        address = f"{address} ({socket.getaddrinfo(address, None)[0][4][0]})"
    except (OSError, UnicodeError):
        address = f"{address} (a name that does not resolve here)"
    return (
        f"MASTER_ADDR={address}, port {ranks.master_port}: expected rank 0 to answer within {seconds:g} s "
        f"(run.connect_seconds); rank {ranks.rank} on {socket.gethostname()} has {listed(interfaces())}. Rank 0 "
        "listens at the address that MASTER_ADDR has on its own host: give one of rank 0's host that the others reach: "
        "MASTER_ADDR, deepspeed --master_addr, or torchrun --local-addr. "
        f"({str(error).splitlines()[0]})"
    )
