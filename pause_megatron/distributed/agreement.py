"""Comparison of ranks before the first step, and errors of one rank raised on every rank.

A rank with another learning rate, corpus or version would silently corrupt training, or hang in a collective. So
each rank makes a record of what must be the same, and its digest goes through the store at MASTER_ADDR. Only where
digests differ, or a rank has failed, are the records read, and all ranks end with one message.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import xxhash

from pause_megatron.distributed.ranks import Ranks, discover, discover_task
from pause_megatron.errors import ConfigError, PauseMegatronError, SharedError
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch.distributed import Store

_SHOWN = 5  # differences of a message
_LONGEST = 120  # characters of a value
_LEAVE_SECONDS = 5.0
_QUIET_SECONDS = 10.0  # after which a failed rank that waits for the others logs its error
_rendezvous_begun = threading.Event()


def same_on_every_rank(keys: Store, ranks: Ranks, record: Mapping[str, str], failure: str = "") -> None:
    """Check that a record is the same on every rank. Every rank calls this, also one that has failed.

    A rank sends a digest and a few messages, however many ranks there are and however long the record is.

    Args:
        keys: Keys of the store that nothing else uses.
        ranks: Rank and world size of this process.
        record: Name -> value of what must be the same, in the order of a message.
        failure: Why this rank cannot take part; "": it can.

    Raises:
        SharedError: Names what differs, or the ranks that failed. The same message on every rank.
    """
    own = json.dumps({"record": dict(record), "failure": failure, "host": socket.gethostname()})
    digest = xxhash.xxh3_128_hexdigest(json.dumps(dict(record)).encode())
    first = keys.compare_set("digest", "", digest).decode()
    if failure or digest != first:
        keys.set("differ", "1")
    if keys.add("done", 1) == ranks.world_size:
        keys.compare_set("verdict", "", "differ" if keys.check(["differ"]) else "same")
    verdict = keys.get("verdict").decode()
    if verdict == "same":
        return
    if verdict == "differ":
        keys.set(f"record/{ranks.rank}", own)
        if ranks.rank == 0:
            by_rank = [json.loads(keys.get(f"record/{rank}")) for rank in range(ranks.world_size)]
            keys.set("message", _message(by_rank))
        verdict = keys.get("message").decode()
    leave_store(keys, ranks, wait=True)
    raise SharedError(verdict)


def abort_comparison(keys: Store, text: str) -> None:
    """End a comparison on all of its ranks, from a process that is not one of them.

    Args:
        keys: Keys of the comparison.
        text: Message of the error that each of its ranks raises.
    """
    keys.compare_set("verdict", "", text)
    keys.add("left", 1)


@contextmanager
def failing_together(verb: str, seconds: float = 600) -> Iterator[None]:
    """Raise what fails in the body on one rank, before the rendezvous, on every rank.

    Args:
        verb: The verb that this rank runs.
        seconds: Timeout of the rendezvous in which the others learn of the failure.

    Raises:
        SharedError: In place of an error that the user can cause. The same message on every rank.
    """
    _rendezvous_begun.clear()
    try:
        yield
    except Exception as error:
        if not _rendezvous_begun.is_set() and not isinstance(error, SharedError):
            _share_failure(verb, seconds, error)
        raise


def mark_rendezvous() -> None:
    """Note that the rendezvous has begun: from here on a failure of this rank reaches the others through it."""
    _rendezvous_begun.set()


def check_same_verb(verb: str, seconds: float = 30) -> None:
    """Check that the other ranks, if any are there, run the same verb. For a rank that does not train.

    Args:
        verb: The verb that this rank runs.
        seconds: Timeout of the rendezvous.

    Raises:
        SharedError: Another rank runs another verb, or failed.
    """
    ranks = discover()
    if ranks.world_size > 1:
        try:
            _rendezvous(ranks, seconds, {"verb": verb})
        except SharedError:
            raise
        except PauseMegatronError:
            return


def ranks_of(numbers: Sequence[int]) -> str:
    """Return ranks as text: [0, 2, 3] -> "ranks 0, 2-3"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


def difference(records: Sequence[Mapping[str, str]]) -> str:
    """Return what differs between the ranks' records, as one or several lines; "" where nothing does.

    Args:
        records: Name -> value, one record a rank.
    """
    names = dict.fromkeys(name for record in records for name in record)
    # The record of a rank that runs another verb is shorter.
    absent = "not set" if len({record.get("verb") for record in records}) == 1 else None
    differences = []
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            if (value := record.get(name, absent)) is not None:
                values.setdefault(value, []).append(rank)
        if len(values) > 1:
            differences.append(
                f"{name} is " + " and ".join(f"{_cut(value)} on {ranks_of(on)}" for value, on in values.items())
            )
    if not differences:
        return ""
    start, more = "expected the same run on every rank:", len(differences) - _SHOWN
    if len(differences) == 1:
        return f"{start} {differences[0]}"
    lines = [start, *differences[:_SHOWN], *([f"(and {more} more)"] if more > 0 else [])]
    return "\n  ".join(lines)


def _message(by_rank: Sequence[Mapping[str, Any]]) -> str:
    failures: dict[str, list[int]] = {}
    for rank, one in enumerate(by_rank):
        if one["failure"]:
            failures.setdefault(one["failure"], []).append(rank)
    if not failures:
        return difference([one["record"] for one in by_rank])
    lines = []
    for text, on in list(failures.items())[:_SHOWN]:
        host = f" on {by_rank[on[0]]['host']}" if len(on) == 1 else ""
        lines.append(text if len(on) == len(by_rank) else f"{ranks_of(on)}{host}: {text}")
    more = f"\n(and {len(failures) - _SHOWN} more)" if len(failures) > _SHOWN else ""
    return "\n".join(lines) + more


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def leave_store(keys: Store, ranks: Ranks, *, wait: bool) -> None:
    """Count this rank among those that have read the outcome. Every rank calls this.

    Args:
        keys: Keys of the store that nothing else uses.
        ranks: Rank and world size of this process.
        wait: Whether rank 0, in whose process the store may live, waits until every rank has.
    """
    from torch.distributed import DistError

    if keys.add("left", 1) >= ranks.world_size:
        keys.set("empty", "")
    if wait and ranks.rank == 0:
        try:
            keys.wait(["empty"], timedelta(seconds=_LEAVE_SECONDS))
        except DistError:
            return


def _share_failure(verb: str, seconds: float, error: Exception) -> None:
    """Raise SharedError once every rank knows of a failure that the user can cause; return for any other failure."""
    try:
        ranks = discover_task()
    except ConfigError:  # the other ranks' address is not known
        return
    if ranks.world_size == 1:
        return
    user_error = isinstance(error, PauseMegatronError)
    text = str(error) if user_error else f"{type(error).__name__}: {error}"
    timer = threading.Timer(
        _QUIET_SECONDS, log.warning, (f"waiting to report to the other ranks: {text}",), {"extra": EVERY_RANK}
    )
    timer.daemon = True
    timer.start()
    try:
        _rendezvous(ranks, seconds, {"verb": verb}, text)
    except SharedError:
        if user_error:
            raise
    except (PauseMegatronError, ImportError):
        pass  # no other rank is there, or no torch: this rank's own error is the message
    finally:
        timer.cancel()


def _rendezvous(ranks: Ranks, seconds: float, record: Mapping[str, str], failure: str = "") -> None:
    import torch.distributed as dist

    from pause_megatron.distributed.rendezvous import compare_in_world, rendezvous

    if dist.is_initialized():
        compare_in_world(record, failure)
    else:
        rendezvous(ranks, "gloo", seconds, record, failure)
