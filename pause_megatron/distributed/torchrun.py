"""`python -m pause_megatron.distributed.torchrun`: torchrun that lets its ranks end in their own way, and says how.

torchrun itself says 1 for every failure, and a job script could not tell a run that was asked to stop from a bug. Told
to end, it gives its ranks 30 seconds, whatever they have to save. Here it passes the signal on and waits for them.
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

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def run() -> int:
    """The exit code: 0, that of the rank that failed first, or 128 + the signal that ended it."""
    for number in _PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup; the ranks then ignore it too
            signal.signal(number, _pass_on)
    with tolerant_output():
        try:
            # What torchrun does not handle stays with the handlers above.
            main(["--signals-to-handle=SIGQUIT", *sys.argv[1:]])
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            print(f"torchrun: {failure.message}", file=sys.stderr)
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """To the ranks, which have sessions of their own. Before there are any, the signal does what it always does."""
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
    """Processes that this one has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            if parent == os.getpid():
                yield int(stat.parent.name)


if __name__ == "__main__":
    sys.exit(run())
