"""The key-value store at MASTER_ADDR, through which ranks say their first words to each other.

Rank 0 keeps it, unless torchrun's agent does. Whoever reaches its port may read and write it: torch knows no password
there. So it listens at MASTER_ADDR's own address alone, where that is an address of rank 0's host.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from pause_megatron.distributed.interfaces import interfaces, listed
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import ConfigError

_THREAD = "connect to MASTER_ADDR"
_ASK_SECONDS = 1.5  # for a program that answers
_KNOCK_SECONDS = 10.0  # for one of a name's addresses to accept a connection


def open_store(ranks: Ranks, seconds: float) -> dist.Store:
    """Rank 0 opens the store, the others connect to it. Does not wait for anybody but rank 0.

    Args:
        seconds: to wait for rank 0.

    Raises:
        ConfigError: nobody answers at MASTER_ADDR, or rank 0 cannot listen there.
    """
    wait = timedelta(seconds=seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's outlives a restart of the ranks.
        prefix = f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        return dist.PrefixStore(prefix, _connected(ranks, wait))
    if ranks.rank:
        return _connected(ranks, wait)
    try:
        listener = _listener(ranks.master_addr, ranks.master_port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and (other := _other_store(ranks)) is not None:
            return other
        raise ConfigError(_cannot_listen(ranks, error)) from None
    return _connected(ranks, wait, listener)  # to its own, too: torch has it go by MASTER_ADDR


def is_connecting() -> bool:
    """Whether a thread is still in torch, which may abort the process, with a code of its own, while it ends."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def own_addresses(name: str) -> list[tuple[int, str]]:
    """Family and address of those that a host name or address leads to and that are this host's own.

    Empty: none is; or the host calls itself by a loopback address (`127.0.1.1 HOST` in /etc/hosts), which others do
    not reach.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # of a name that no host can have
        return []
    loopback = name == "localhost" or name.startswith("127.") or name == "::1"
    own = []
    for family, kind, protocol, _, address in found:
        if not loopback and (address[0].startswith("127.") or address[0] == "::1"):
            return []
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
        own.append((family, address[0]))
    return own


def _listener(name: str, port: int) -> socket.socket:
    """On MASTER_ADDR's own address; on all where it has none here (behind address translation)."""
    for family, address in own_addresses(name)[:1]:
        return socket.create_server((address, port), family=family, backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=4096)


def _connected(ranks: Ranks, wait: timedelta, listener: socket.socket | None = None) -> dist.Store:
    """Connect, once somebody listens there; keep the store on the listener, if one is given.

    In a thread, since torch waits without an end for a program that listens and says nothing. Not before somebody
    listens: until then there is nothing that torch does better, and its threads are hard to leave (`is_connecting`).

    Raises:
        ConfigError: nobody answers, or no store.
    """
    found: list[dist.Store | Exception] = []
    port = ranks.master_port if listener is None else listener.getsockname()[1]
    if (unheard := _unheard(ranks.master_addr, port, wait.total_seconds())) is not None:
        if listener is not None:
            listener.close()
        raise ConfigError(_nobody(ranks, wait.total_seconds(), unheard))

    def connect() -> None:
        kept = {} if listener is None else {"master_listen_fd": listener.detach()}
        address = (ranks.master_addr, port, ranks.world_size)
        try:
            found.append(dist.TCPStore(*address, is_master=bool(kept), timeout=wait, wait_for_workers=False, **kept))
        except dist.DistError as error:
            found.append(error)

    thread = threading.Thread(target=connect, name=_THREAD, daemon=True)
    thread.start()
    thread.join(wait.total_seconds() + _ASK_SECONDS)
    if found and isinstance(found[0], dist.Store):
        return found[0]
    error = found[0] if found else "it accepts connections, and is no store of torch's"
    raise ConfigError(_nobody(ranks, wait.total_seconds(), error))


def _unheard(name: str, port: int, seconds: float) -> Exception | None:
    """Why nobody accepts a connection there for so long; None: somebody does."""
    end, pause = time.monotonic() + seconds, 0.02
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((name, port), timeout=min(max(left, 0.1), _KNOCK_SECONDS)):
                return None
        except (OSError, UnicodeError) as error:
            if left < pause:
                return error
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _other_store(ranks: Ranks) -> dist.Store | None:
    """That of another process which says that it is rank 0; None: something else listens on the port."""
    try:
        return _connected(ranks, timedelta(seconds=_ASK_SECONDS))
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


def _nobody(ranks: Ranks, seconds: float, error: object) -> str:
    address = ranks.master_addr
    try:
        address = f"{address} ({socket.getaddrinfo(address, None)[0][4][0]})"
    except (OSError, UnicodeError):
        address = f"{address} (a name that leads nowhere here)"
    return (
        f"MASTER_ADDR={address}, port {ranks.master_port}: expected rank 0 to answer within {seconds:g} s "
        f"(run.connect_seconds); rank {ranks.rank} on {socket.gethostname()} has {listed(interfaces())}. Rank 0 "
        "listens at the address that MASTER_ADDR has on its own host: give one of rank 0's host that the others reach: "
        "MASTER_ADDR, deepspeed --master_addr, or torchrun --local-addr. "
        f"({str(error).splitlines()[0]})"
    )
