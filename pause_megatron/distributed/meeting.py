"""How ranks find each other at the start: they meet at MASTER_ADDR, and then make sure that each reaches the next.

A wrong address makes gloo and NCCL wait without a word until a time-out that is long enough for any collective
operation. Here it is an error that names the address, the interface, and the variable to set.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from pause_megatron.distributed.interfaces import VARIABLES, interface_towards, interfaces, own_endpoint
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import ConfigError

_KNOCK_SECONDS = 15.0  # for a connection to a rank that is there
_LEAVE_SECONDS = 5.0
_SHOWN = 2


def meet(ranks: Ranks, backend: str, seconds: float) -> dist.Store:
    """The store of the run, once all ranks are there and each has reached the next at the address of the backend.

    Which interface NCCL takes is known less surely than which one gloo takes, so for NCCL it is a warning.

    Args:
        ranks: this rank's place; the environment says the same
        backend: "gloo" or "nccl"
        seconds: to wait for the others

    Raises:
        ConfigError: no answer at MASTER_ADDR, a rank that did not come, or one that cannot be reached. On every rank.
    """
    wait = timedelta(seconds=seconds)
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=wait))
    except dist.DistError as error:
        raise ConfigError(_nobody(ranks, seconds, error)) from None
    store.set_timeout(wait)
    try:
        failures = _reach_the_next(own_keys(store, ranks), ranks, backend, min(seconds, _KNOCK_SECONDS))
    except dist.DistError:
        raise ConfigError(
            f"rank {ranks.rank} on {socket.gethostname()}: expected {ranks.world_size} ranks to come within "
            f"{seconds:g} s (run.connect_seconds); some did not, or ended: see what the others say"
        ) from None
    if failures and backend == "gloo":
        raise ConfigError(failures)
    if failures and ranks.rank == 0:
        print(f"warning: {failures}", file=sys.stderr, flush=True)
    return store


def own_keys(store: dist.Store, ranks: Ranks) -> dist.Store:
    """Keys of this meeting: torchrun's store outlives a restart of the ranks, and a process may meet again."""
    keys = dist.PrefixStore(f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return dist.PrefixStore(str(keys.add(f"meetings/{ranks.rank}", 1)), keys)


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
    card = {"name": name, "error": "", "endpoint": "", "interfaces": _listed(interfaces())}
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


def _nobody(ranks: Ranks, seconds: float, error: Exception) -> str:
    address = ranks.master_addr
    try:
        address = f"{address} ({socket.gethostbyname(address)})"
    except OSError:
        address = f"{address} (a name that leads nowhere here)"
    what = "to hear from all ranks" if ranks.rank == 0 else "rank 0 to answer"
    return (
        f"MASTER_ADDR={address}, port {ranks.master_port}: expected {what} within {seconds:g} s (run.connect_seconds); "
        f"rank {ranks.rank} on {socket.gethostname()} has {_listed(interfaces())}. Give an address of rank 0's host "
        "that the others reach: MASTER_ADDR, deepspeed --master_addr, or torchrun --local-addr. "
        f"({str(error).splitlines()[0]})"
    )


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in found.items())
