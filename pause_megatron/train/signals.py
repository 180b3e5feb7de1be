"""Being asked to stop: a flag that the loop reads once a step, so that all ranks stop at the same one."""

from __future__ import annotations

import signal
from types import FrameType

# Not SIGUSR1: NCCL takes it for itself.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR2. The step under way is finished and a checkpoint saved. Use as a context."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
