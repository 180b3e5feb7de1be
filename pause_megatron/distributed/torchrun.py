"""`python -m pause_megatron.distributed.torchrun`: torchrun whose exit code is that of the rank that ended first.

torchrun itself says 1 for every failure, and a job script could not tell a run that was asked to stop from a bug.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    """The exit code: 0, a rank's own, or 128 + the signal that ended it."""
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        print(f"torchrun: {failure.message}", file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run())
