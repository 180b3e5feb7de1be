"""`python -m pause_megatron.distributed.torchrun`: torchrun that forwards signals and keeps its ranks' exit code.

torchrun itself exits with 1 for every failure, so a job script could not tell a requested stop from a bug. It also
kills its ranks 30 seconds after a signal, however long they take to save. Here it forwards the signal and waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from pause_megatron.terminal.output import tolerant_output, write_from_handler

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def run() -> int:
    """Run torchrun, and return the exit code of the rank that failed first, 128 + its signal, or 0."""
    for number in _FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup: the ranks ignore it, too
            signal.signal(number, _forward)
    with tolerant_output():
        try:
            # torchrun must not replace the handlers above.
            main(["--signals-to-handle=SIGQUIT", *sys.argv[1:]])
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            print(f"torchrun: {failure.message}", file=sys.stderr)
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def _forward(number: int, frame: FrameType | None) -> None:
    """Forward a signal to the ranks, which have sessions of their own; without ranks, take its default action."""
    ranks = list(_children())
    if not ranks:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.kill(os.getpid(), number)
    name = signal.Signals(number).name
    write_from_handler(f"torchrun: {name} was passed on to {len(ranks)} processes, waiting until they end")
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


def _children() -> Iterator[int]:
    """Yield the process ids of this process's children."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            if parent == os.getpid():
                yield int(stat.parent.name)


if __name__ == "__main__":
    sys.exit(run())
