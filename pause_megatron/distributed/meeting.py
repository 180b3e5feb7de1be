"""How ranks find each other at the start: they meet at MASTER_ADDR, and then make sure that each reaches the next.

A wrong address makes gloo and NCCL wait without a word until a time-out that is long enough for any collective
operation. Here it is an error that names the address, the interface, and the variable to set.
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
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch.distributed as dist

from pause_megatron.distributed import agreement
from pause_megatron.distributed.interfaces import VARIABLES, interface_towards, interfaces, listed, own_endpoint
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.distributed.store import open_store
from pause_megatron.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

_KNOCK_SECONDS = 15.0  # for a connection to a rank that is there
_LEAVE_SECONDS = 5.0
_SHOWN = 2


def meet(
    ranks: Ranks, backend: str, seconds: float, record: Mapping[str, str] | None = None, failure: str = ""
) -> dist.Store:
    """The store of the run, once all ranks are there, are of one run, and each has reached the next.

    Which interface NCCL takes is known less surely than which one gloo takes, so for NCCL it is a warning.

    Args:
        ranks: this rank's place; the environment says the same
        backend: "gloo" or "nccl"
        seconds: to wait for the others
        record: what must be the same on every rank; see `agreement.same_on_every_rank`
        failure: why this rank cannot go on; "": it can

    Raises:
        ConfigError: no answer at MASTER_ADDR, two processes with one rank, a rank that did not come, cannot go on or
            cannot be reached, or ranks that differ. On every rank.
    """
    agreement.has_met()
    store = open_store(ranks, seconds)
    store.set_timeout(timedelta(seconds=seconds))
    try:
        keys = take_place(store, ranks)
        agreement.same_on_every_rank(dist.PrefixStore("same", keys), ranks, record or {}, failure)
        failures = _reach_the_next(dist.PrefixStore("reach", keys), ranks, backend, min(seconds, _KNOCK_SECONDS))
    except dist.DistError:
        raise ConfigError(failure or _absent(store, ranks, seconds)) from None
    if failures and backend == "gloo":
        raise ConfigError(failures)
    if failures and ranks.rank == 0:
        log.warning(failures)
    return store


def meet_in_world(record: Mapping[str, str], failure: str = "") -> None:
    """Likewise for the ranks of a world that somebody else has made and that stands. Every rank calls this.

    Raises:
        SharedError: ranks that differ, or one that cannot go on. On every rank.
    """
    agreement.has_met()
    ranks = Ranks(dist.get_rank(), 0, dist.get_world_size(), "", 0, "environment")
    store = dist.PrefixStore("pause_megatron", dist.distributed_c10d._get_default_store())
    agreement.same_on_every_rank(own_keys(store, ranks), ranks, record, failure)


def own_keys(store: dist.Store, ranks: Ranks) -> dist.Store:
    """Keys of this meeting: a process may meet again."""
    return _meeting(store, store.add(f"meetings/{ranks.rank}", 1))


def take_place(store: dist.Store, ranks: Ranks) -> dist.Store:
    """Keys of this meeting, for the one process that has this rank.

    Raises:
        TrainingError: another process has the same RANK, or another WORLD_SIZE. Those who wait are told, too.
    """
    process, token = _process(os.getpid())
    me = {"rank": ranks.rank, "size": ranks.world_size, "process": process, "token": token}
    owner, first = (_first_of(store, key, me) for key in (f"place/{ranks.rank}", "world"))
    if owner["token"] != token:
        text = (
            f"RANK={ranks.rank}: expected one process with each rank, got two: {owner['process']}, and {process}. "
            "Give each process its own RANK; if these are two runs, give each its own MASTER_PORT"
        )
        _refuse(store, owner["rank"], text)
    elif first["size"] != ranks.world_size:
        said = " and ".join(f"{one['size']} on rank {one['rank']} ({one['process']})" for one in (first, me))
        _refuse(store, first["rank"], f"WORLD_SIZE: expected the same number on every rank, got {said}")
    return own_keys(store, ranks)


@cache
def _process(number: int) -> tuple[str, str]:
    """What a process is called, and a token that no other has: hosts may share names, and so numbers."""
    return f"process {number} on {socket.gethostname()}", uuid.uuid4().hex


def _first_of(store: dist.Store, key: str, me: dict) -> dict:
    """What the first to come has left there."""
    return json.loads(store.compare_set(key, "", json.dumps(me)))


def _refuse(store: dist.Store, rank: int, text: str) -> NoReturn:
    """Tell it to the meeting that a rank is in, which will not be complete."""
    number = store.add(f"meetings/{rank}", 0)
    agreement.refuse(dist.PrefixStore("same", _meeting(store, max(1, number))), text)
    raise TrainingError(text)


def _meeting(store: dist.Store, number: int) -> dist.Store:
    return dist.PrefixStore(f"meeting/{number}", store)


def _absent(store: dist.Store, ranks: Ranks, seconds: float) -> str:
    """Which ranks did not come."""
    try:
        absent = [rank for rank in range(ranks.world_size) if not store.check([f"place/{rank}"])]
    except dist.DistError:  # with its keeper, rank 0
        absent = [0]
    came = f"{agreement.ranks_of(absent)} did not" if absent else "all did, but some ended"
    return (
        f"rank {ranks.rank} on {socket.gethostname()}: expected {ranks.world_size} ranks to come within {seconds:g} s "
        f"(run.connect_seconds) to MASTER_ADDR={ranks.master_addr}, port {ranks.master_port}; {came}: see what the "
        "others say"
    )


def agree(store: dist.Store, ranks: Ranks, failure: str) -> list[str]:
    """What failed on any rank, sorted: the same on every rank. Every rank calls this.

    Args:
        store: keys that nobody else uses.
        failure: of this rank, one line; "": none.
    """
    if failure:
        store.append("failures", f"{failure}\n")
    if store.add("done", 1) == ranks.world_size:
        # Nothing failed where the key is not there.
        store.set("verdict", store.get("failures") if store.check(["failures"]) else b"")
    texts = sorted(filter(None, store.get("verdict").decode().split("\n")))
    _leave(store, ranks, bool(texts))
    return texts


def _reach_the_next(store: dist.Store, ranks: Ranks, backend: str, seconds: float) -> str:
    """What failed, on any rank; the same text on every rank."""
    rank, following = ranks.rank, (ranks.rank + 1) % ranks.world_size
    name = f"rank {rank} on {socket.gethostname()}"
    with _doorkeeper(backend, name) as card:
        store.set(f"card/{rank}", json.dumps(card))
        other = json.loads(store.get(f"card/{following}"))
        if failure := card["error"] or _knock(other, seconds):
            advice = f"; {name} has {card['interfaces']}, {other['name']} has {other['interfaces']}"
            towards = interface_towards(ranks.master_addr)
            advice += f"; MASTER_ADDR={ranks.master_addr} is reached by {towards}" if towards not in ("", "lo") else ""
            failure = f"{name}: {failure}{advice}"
        texts = agree(store, ranks, failure)
    return _verdict(texts, backend)


@contextmanager
def _doorkeeper(backend: str, name: str) -> Iterator[dict]:
    """Listens where the backend will, tells whoever comes its name, and yields what the others must know."""
    card = {"name": name, "error": "", "endpoint": "", "interfaces": listed(interfaces())}
    listener = None
    try:
        if endpoint := own_endpoint(backend):
            listener = socket.create_server((endpoint.address, 0), backlog=16)
            card |= {"endpoint": str(endpoint), "address": endpoint.address, "port": listener.getsockname()[1]}
            threading.Thread(target=_answer, args=(listener, name.encode()), daemon=True).start()
    except (ConfigError, OSError) as error:
        card["error"] = str(error)
    try:
        yield card
    finally:
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            listener.close()


def _answer(listener: socket.socket, name: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.sendall(name)


def _knock(other: dict, seconds: float) -> str:
    """Why the other rank does not answer at its address; "" when it does, or has none to try."""
    if not other["endpoint"]:
        return ""
    try:
        with socket.create_connection((other["address"], other["port"]), timeout=seconds) as connection:
            answer = connection.makefile("rb").read().decode(errors="replace")
    except OSError as error:
        answer = f"{error or type(error).__name__}"
    if answer == other["name"]:
        return ""
    return f"no answer from {other['name']} at {other['endpoint']}: {answer}"


def _leave(store: dist.Store, ranks: Ranks, failed: bool) -> None:
    """The store may live in rank 0's process: before it ends, the others have read why."""
    left = store.add("left", 1)
    if left == ranks.world_size:
        store.set("empty", "")
    if failed and ranks.rank == 0:
        try:
            store.wait(["empty"], timedelta(seconds=_LEAVE_SECONDS))
        except dist.DistError:
            return


def _verdict(texts: list[str], backend: str) -> str:
    if not texts:
        return ""
    more = f"\n(and {len(texts) - _SHOWN} more)" if len(texts) > _SHOWN else ""
    return (
        f"{backend}: expected every rank to reach the next; set {VARIABLES[backend]} to the interface that joins the "
        "hosts, or let the host names lead to its address:\n" + "\n".join(texts[:_SHOWN]) + more
    )
