"""Rendezvous: all ranks register in the store at MASTER_ADDR, are compared, and each probes the next.

With a wrong address gloo and NCCL hang, without a message, until a timeout that is long enough for any collective. Here
it is an error that names the address, the interface, and the variable to set.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from pause_megatron.distributed import agreement
from pause_megatron.distributed.interfaces import VARIABLES, interface_towards, interfaces, listed, own_endpoint
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.distributed.store import open_store
from pause_megatron.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

_PROBE_SECONDS = 15.0  # for a connection to a rank that listens
_SHOWN = 2


@dataclass(frozen=True)
class _Process:
    """One process as the others see it.

    The field names and the keys of the store must not change: ranks that run two versions get as far as the comparison
    that says so.

    Attributes:
        rank: Its rank.
        size: Its world size.
        process: Its process number and host, for messages.
        token: Random, since hosts may share names and process numbers.
    """

    rank: int
    size: int
    process: str
    token: str


@dataclass(frozen=True)
class _Advertisement:
    """Where a rank listens for the probe of the one before it.

    Attributes:
        name: Rank and host.
        interfaces: Interfaces of the host, for messages.
        error: Why it cannot listen; "": it can.
        endpoint: Address, interface and reason, for messages; "": the backend's address is not known.
        address: IPv4 address.
        port: Port.
    """

    name: str
    interfaces: str
    error: str = ""
    endpoint: str = ""
    address: str = ""
    port: int = 0


def rendezvous(
    ranks: Ranks, backend: str, seconds: float, record: Mapping[str, str] | None = None, failure: str = ""
) -> Store:
    """Return the run's store once all ranks have registered, agree on the run, and each has reached the next.

    The interface that NCCL takes is known less surely than gloo's, so an unreachable rank is a warning for NCCL.

    Args:
        ranks: Rank and world size of this process, as in its environment.
        backend: "gloo" or "nccl".
        seconds: Timeout of the rendezvous.
        record: What must be the same on every rank; see `agreement.same_on_every_rank`.
        failure: Why this rank cannot take part; "": it can.

    Raises:
        ConfigError: No answer at MASTER_ADDR, two processes with one rank, a missing, failed or unreachable rank, or
            ranks that differ. On every rank.
    """
    agreement.mark_rendezvous()
    store = open_store(ranks, seconds)
    store.set_timeout(timedelta(seconds=seconds))
    try:
        keys = register_rank(store, ranks)
        agreement.same_on_every_rank(PrefixStore("same", keys), ranks, record or {}, failure)
        failures = _probe_next_rank(PrefixStore("probe", keys), ranks, backend, min(seconds, _PROBE_SECONDS))
    except dist.DistError:
        raise ConfigError(failure or _missing_ranks(store, ranks, seconds)) from None
    if failures and backend == "gloo":
        raise ConfigError(failures)
    if failures and ranks.rank == 0:
        log.warning(failures)
    return store


def compare_in_world(record: Mapping[str, str], failure: str = "") -> None:
    """Compare the ranks of a torch.distributed world that was initialized outside. Every rank calls this.

    Args:
        record: What must be the same on every rank; see `agreement.same_on_every_rank`.
        failure: Why this rank cannot take part; "": it can.

    Raises:
        SharedError: Ranks differ, or one cannot take part. On every rank.
    """
    agreement.mark_rendezvous()
    ranks = Ranks(dist.get_rank(), 0, dist.get_world_size(), "", 0, "environment")
    store = PrefixStore("pause_megatron", dist.distributed_c10d._get_default_store())
    agreement.same_on_every_rank(next_round(store, ranks), ranks, record, failure)


def next_round(store: Store, ranks: Ranks) -> Store:
    """Return the store under a prefix of its own, since a process may take part in several rendezvous.

    Every rank calls this the same number of times.

    Args:
        store: The run's store.
        ranks: Rank of this process.
    """
    return _round(store, store.add(f"meetings/{ranks.rank}", 1))


def register_rank(store: Store, ranks: Ranks) -> Store:
    """Register this process under its rank, and return the store under the rendezvous's prefix.

    Args:
        store: The run's store.
        ranks: Rank and world size of this process.

    Raises:
        TrainingError: Another process has the same RANK, or another WORLD_SIZE. The waiting ranks get the same message.
    """
    description, token = _identity(os.getpid())
    own = _Process(ranks.rank, ranks.world_size, description, token)
    owner, first = (_set_first(store, key, own) for key in (f"place/{ranks.rank}", "world"))
    if owner.token != token:
        text = (
            f"RANK={ranks.rank}: expected one process with each rank, got two: {owner.process}, and {description}. "
            "Give each process its own RANK; if these are two runs, give each its own MASTER_PORT"
        )
        _abort(store, owner.rank, text)
    elif first.size != ranks.world_size:
        sizes = " and ".join(f"{one.size} on rank {one.rank} ({one.process})" for one in (first, own))
        _abort(store, first.rank, f"WORLD_SIZE: expected the same number on every rank, got {sizes}")
    return next_round(store, ranks)


def collect_failures(store: Store, ranks: Ranks, failure: str) -> list[str]:
    """Return what failed on any rank, sorted: the same list on every rank. Every rank calls this.

    Args:
        store: Keys that nothing else uses.
        ranks: Rank and world size of this process.
        failure: What failed on this rank, one line; "": nothing.
    """
    if failure:
        store.append("failures", f"{failure}\n")  # type: ignore[attr-defined]  # torch's stub has no append
    if store.add("done", 1) == ranks.world_size:
        # Nothing failed where the key is not there.
        store.set("verdict", store.get("failures").decode() if store.check(["failures"]) else "")
    texts = sorted(filter(None, store.get("verdict").decode().split("\n")))
    agreement.leave_store(store, ranks, wait=bool(texts))
    return texts


@cache
def _identity(process_id: int) -> tuple[str, str]:
    """Return a description of the process and a token of its own."""
    return f"process {process_id} on {socket.gethostname()}", uuid.uuid4().hex


def _set_first(store: Store, key: str, own: _Process) -> _Process:
    """Set a key unless it is set, and return the process that set it."""
    return _Process(**json.loads(store.compare_set(key, "", json.dumps(asdict(own)))))


def _abort(store: Store, rank: int, text: str) -> NoReturn:
    """Abort the rendezvous that a rank is in: it cannot be complete."""
    number = store.add(f"meetings/{rank}", 0)
    agreement.abort_comparison(PrefixStore("same", _round(store, max(1, number))), text)
    raise TrainingError(text)


def _round(store: Store, number: int) -> Store:
    return PrefixStore(f"meeting/{number}", store)


def _missing_ranks(store: Store, ranks: Ranks, seconds: float) -> str:
    try:
        missing = [rank for rank in range(ranks.world_size) if not store.check([f"place/{rank}"])]
    except dist.DistError:  # the store ended with rank 0
        missing = [0]
    got = f"{agreement.ranks_of(missing)} missing" if missing else "all of them, but some ended"
    return (
        f"rank {ranks.rank} on {socket.gethostname()}: expected {ranks.world_size} ranks within {seconds:g} s "
        f"(run.connect_seconds) at MASTER_ADDR={ranks.master_addr}, port {ranks.master_port}; got {got}: see the other "
        "ranks' output"
    )


def _probe_next_rank(store: Store, ranks: Ranks, backend: str, seconds: float) -> str:
    """Return which ranks could not reach the next, the same text on every rank; "" where all could."""
    rank, following = ranks.rank, (ranks.rank + 1) % ranks.world_size
    name = f"rank {rank} on {socket.gethostname()}"
    with _advertise(backend, name) as own:
        store.set(f"advertisement/{rank}", json.dumps(asdict(own)))
        peer = _Advertisement(**json.loads(store.get(f"advertisement/{following}")))
        if failure := own.error or _probe_peer(peer, seconds):
            advice = f"; {name} has {own.interfaces}, {peer.name} has {peer.interfaces}"
            towards = interface_towards(ranks.master_addr)
            advice += f"; MASTER_ADDR={ranks.master_addr} is reached by {towards}" if towards not in ("", "lo") else ""
            failure = f"{name}: {failure}{advice}"
        texts = collect_failures(store, ranks, failure)
    return _unreachable(texts, backend)


@contextmanager
def _advertise(backend: str, name: str) -> Iterator[_Advertisement]:
    """Listen at the address that the backend will use, and send the rank's name to each connection."""
    own = _Advertisement(name, listed(interfaces()))
    listener = None
    try:
        if endpoint := own_endpoint(backend):
            listener = socket.create_server((endpoint.address, 0), backlog=16)
            port = listener.getsockname()[1]
            own = _Advertisement(name, own.interfaces, "", str(endpoint), endpoint.address, port)
            threading.Thread(target=_send_name, args=(listener, name.encode()), daemon=True).start()
    except (ConfigError, OSError) as error:
        own = _Advertisement(name, own.interfaces, str(error))
    try:
        yield own
    finally:
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            listener.close()


def _send_name(listener: socket.socket, name: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.sendall(name)


def _probe_peer(peer: _Advertisement, seconds: float) -> str:
    """Return why a rank does not answer at its address; "" where it does, or its address is not known."""
    if not peer.endpoint:
        return ""
    try:
        with socket.create_connection((peer.address, peer.port), timeout=seconds) as connection:
            answer = connection.makefile("rb").read().decode(errors="replace")
    except OSError as error:
        answer = f"{error or type(error).__name__}"
    if answer == peer.name:
        return ""
    return f"no answer from {peer.name} at {peer.endpoint}: {answer}"


def _unreachable(texts: list[str], backend: str) -> str:
    if not texts:
        return ""
    more = f"\n(and {len(texts) - _SHOWN} more)" if len(texts) > _SHOWN else ""
    return (
        f"{backend}: expected every rank to reach the next; set {VARIABLES[backend]} to the interface that joins the "
        "hosts, or let the host names resolve to its address:\n" + "\n".join(texts[:_SHOWN]) + more
    )
