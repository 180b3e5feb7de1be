"""Whether all ranks are of one run: what decides it is compared before the first step, and one rank's failure is told.

A rank that has another learning rate, corpus or version trains without a word, and wrongly, or waits for ever in a
collective operation. So each rank makes a record of what must be the same, and its digest goes through the store at
MASTER_ADDR. Only where digests differ, or a rank has failed, are the records read, and all ranks end with one message.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import xxhash

from pause_megatron.distributed.ranks import Ranks, discover, discover_task
from pause_megatron.errors import ConfigError, PauseMegatronError, SharedError
from pause_megatron.terminal.log import EVERY_RANK

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch.distributed as dist

_SHOWN = 5  # differences of a message
_LONGEST = 120  # characters of a value
_LEAVE_SECONDS = 5.0
_QUIET_SECONDS = 10.0  # that a rank which failed waits for the others before it says so itself
_met = threading.Event()


def same_on_every_rank(keys: dist.Store, ranks: Ranks, record: Mapping[str, str], failure: str = "") -> None:
    """Compare what must be the same. Every rank calls this, also one that cannot go on.

    A rank's share is a digest and a few messages, however many ranks there are and however long the record is.

    Args:
        keys: that nobody else uses.
        record: name -> value, in the order of a message.
        failure: why this rank cannot go on; "": it can.

    Raises:
        SharedError: it names what differs, or who cannot go on. The same on every rank.
    """
    text = json.dumps({"record": dict(record), "failure": failure, "host": socket.gethostname()})
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
        keys.set(f"record/{ranks.rank}", text)
        if ranks.rank == 0:
            everyone = [json.loads(keys.get(f"record/{rank}")) for rank in range(ranks.world_size)]
            keys.set("message", _message(everyone))
        verdict = keys.get("message").decode()
    _leave(keys, ranks)
    raise SharedError(verdict)


def refuse(keys: dist.Store, text: str) -> None:
    """End a comparison that is under way, for a process that is none of its ranks."""
    keys.compare_set("verdict", "", text)
    keys.add("left", 1)


@contextmanager
def failing_together(verb: str, seconds: float = 600) -> Iterator[None]:
    """What fails in the body on this rank alone, before ranks have met, becomes the error of all of them.

    Args:
        verb: that this rank runs.
        seconds: to wait for the others.

    Raises:
        SharedError: in place of an error that the user can cause. On every rank, in the same words.
    """
    _met.clear()
    try:
        yield
    except Exception as error:
        if not _met.is_set() and not isinstance(error, SharedError):
            _tell(verb, seconds, error)
        raise


def has_met() -> None:
    """From here on the others know this rank."""
    _met.set()


def show_up(verb: str, seconds: float = 30) -> None:
    """Tell others that this rank does something else than they do, if they come.

    Raises:
        SharedError: they do something else, or cannot go on.
    """
    ranks = discover()
    if ranks.world_size > 1:
        try:
            _meet(ranks, seconds, {"verb": verb})
        except SharedError:
            raise
        except PauseMegatronError:
            return


def ranks_of(numbers: Sequence[int]) -> str:
    """[0, 2, 3] -> "ranks 0, 2-3"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


def difference(records: Sequence[Mapping[str, str]]) -> str:
    """What differs between the ranks' records, one line, or some lines; "" where nothing does."""
    names = dict.fromkeys(name for record in records for name in record)
    # One that does something else says less.
    absent = "not set" if len({record.get("verb") for record in records}) == 1 else None
    found = []
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            if (value := record.get(name, absent)) is not None:
                values.setdefault(value, []).append(rank)
        if len(values) > 1:
            found.append(
                f"{name} is " + " and ".join(f"{_cut(value)} on {ranks_of(on)}" for value, on in values.items())
            )
    if not found:
        return ""
    start, more = "expected the same run on every rank:", len(found) - _SHOWN
    if len(found) == 1:
        return f"{start} {found[0]}"
    lines = [start, *found[:_SHOWN], *([f"(and {more} more)"] if more > 0 else [])]
    return "\n  ".join(lines)


def _message(everyone: Sequence[Mapping]) -> str:
    failures: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        if one["failure"]:
            failures.setdefault(one["failure"], []).append(rank)
    if not failures:
        return difference([one["record"] for one in everyone])
    said = []
    for text, on in list(failures.items())[:_SHOWN]:
        host = f" on {everyone[on[0]]['host']}" if len(on) == 1 else ""
        said.append(text if len(on) == len(everyone) else f"{ranks_of(on)}{host}: {text}")
    more = f"\n(and {len(failures) - _SHOWN} more)" if len(failures) > _SHOWN else ""
    return "\n".join(said) + more


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def _leave(keys: dist.Store, ranks: Ranks) -> None:
    """The store may live in rank 0's process: before it ends, the others have read why."""
    import torch.distributed as dist

    if keys.add("left", 1) >= ranks.world_size:
        keys.set("empty", "")
    if ranks.rank == 0:
        try:
            keys.wait(["empty"], timedelta(seconds=_LEAVE_SECONDS))
        except dist.DistError:
            return


def _tell(verb: str, seconds: float, error: Exception) -> None:
    """Raises SharedError once all know of a failure that the user can cause; returns where the error says enough."""
    try:
        ranks = discover_task()
    except ConfigError:  # it does not know where the others are
        return
    if ranks.world_size == 1:
        return
    mine = isinstance(error, PauseMegatronError)
    text = str(error) if mine else f"{type(error).__name__}: {error}"
    said = threading.Timer(
        _QUIET_SECONDS, log.warning, (f"waiting to tell the other ranks: {text}",), {"extra": EVERY_RANK}
    )
    said.daemon = True
    said.start()
    try:
        _meet(ranks, seconds, {"verb": verb}, text)
    except SharedError:
        if mine:
            raise
    except (PauseMegatronError, ImportError):
        pass  # nobody came, or there is no torch here: this rank's error is what there is to say
    finally:
        said.cancel()


def _meet(ranks: Ranks, seconds: float, record: Mapping[str, str], failure: str = "") -> None:
    import torch.distributed as dist

    from pause_megatron.distributed.meeting import meet, meet_in_world

    if dist.is_initialized():
        meet_in_world(record, failure)
    else:
        meet(ranks, "gloo", seconds, record, failure)
