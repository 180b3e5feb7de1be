"""What happens around the steps. Each hook sees every step's result, in the order of the list."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from pause_megatron.errors import TrainingError
from pause_megatron.terminal.log import EVERY_RANK
from pause_megatron.terminal.output import reason
from pause_megatron.train.loop import StepResult

log = logging.getLogger(__name__)


class Hook(Protocol):
    """Called on every rank after every step, and closed when the run ends, however it ends."""

    def __call__(self, result: StepResult) -> None: ...

    def stop(self, result: StepResult) -> None:
        """The run is asked to stop before its end; `result` is its last step, which the hook has seen."""

    def close(self) -> None: ...

    def lost(self) -> str | None:
        """What it could not write in the run, in a line; None where nothing is missing."""


class Every:
    """Calls an action every so many steps, and after the last one.

    Args:
        steps: 0: after the last one only
        action: what to do
        at_end: after the last step too
        on_stop: also when the run is asked to stop before its end
    """

    def __init__(
        self, steps: int, action: Callable[[StepResult], Any], *, at_end: bool = True, on_stop: bool = False
    ) -> None:
        self._steps, self._action, self._at_end, self._on_stop = steps, action, at_end, on_stop

    def __call__(self, result: StepResult) -> None:
        if self._due(result):
            self._action(result)

    def stop(self, result: StepResult) -> None:
        if self._on_stop and not self._due(result):
            self._action(result)

    def close(self) -> None:
        close = getattr(self._action, "close", None)
        if close is not None:
            close()

    def lost(self) -> str | None:
        """As `Unfailing.lost`, of its action."""
        return self._action.lost() if isinstance(self._action, Unfailing) else None

    def _due(self, result: StepResult) -> bool:
        return (self._steps > 0 and result.step % self._steps == 0) or (self._at_end and result.last)


class Monitor(Protocol):
    """What only tells of a run: a log, a tracker, a bar."""

    def open(self) -> None:
        """Before the first step."""

    def __call__(self, result: StepResult) -> None: ...

    def close(self) -> None: ...


class Unfailing:
    """A monitor, or one of its actions, that cannot end a run: what it raises is said once, and counted.

    It is called at later steps all the same: a full disk may be emptied.

    Args:
        place: the file or folder, for messages
        unit: what a call writes, in the plural
        action: called after steps, and opened and closed where it can be
    """

    def __init__(self, place: object, unit: str, action: Monitor | Callable[[StepResult], Any]) -> None:
        self._place, self._unit, self._action = place, unit, action
        self._calls = self._failures = 0
        self._reason: str | None = None
        self._try(getattr(action, "open", None))

    def __call__(self, result: StepResult) -> None:
        self._calls += 1
        self._failures += not self._try(self._action, result)

    def stop(self, result: StepResult) -> None:
        pass

    def close(self) -> None:
        closed = self._try(getattr(self._action, "close", None))
        if closed and not self._failures:
            self._reason = None  # what failed at first was made good

    def lost(self) -> str | None:
        """What could not be written in the run, in a line; None where nothing is missing."""
        if self._reason is None:
            return None
        if not self._failures:
            return f"{self._place} could not be written ({self._reason})"
        return (
            f"{self._place}: {self._failures:,} of {self._calls:,} {self._unit} could not be written ({self._reason})"
        )

    def _try(self, action: Callable[..., Any] | None, *arguments: StepResult) -> bool:
        if action is None:
            return True
        try:
            action(*arguments)
        except Exception as error:
            if self._reason is None:
                self._reason = reason(error)
                again = "training goes on, and each time it is tried again"
                log.warning(f"{self._place}: cannot be written: {self._reason}; {again}", extra=EVERY_RANK)
            return False
        return True


class SkipLimit:
    """Ends a run whose gradient is not finite several times in a row: it will not recover by itself."""

    def __init__(self, limit: int) -> None:
        self._limit, self._in_a_row = limit, 0

    def __call__(self, result: StepResult) -> None:
        self._in_a_row = 0 if result.applied else self._in_a_row + 1
        if self._in_a_row >= self._limit:
            raise TrainingError(
                f"step {result.step}: the gradient norm is {result.grad_norm}, and {self._in_a_row} steps in a row "
                "were not finite and not applied. Lower optim.lr, or look at the data of these steps"
            )

    def stop(self, result: StepResult) -> None:
        pass

    def close(self) -> None:
        pass

    def lost(self) -> None:
        pass
