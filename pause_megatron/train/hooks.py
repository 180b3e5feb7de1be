"""Hooks: what runs after every step, in the order of a list. A hook may return metrics for the hooks after it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pause_megatron.errors import TrainingError
from pause_megatron.terminal.log import EVERY_RANK
from pause_megatron.terminal.output import reason
from pause_megatron.train.loop import Metrics, StepResult

Action = Callable[[StepResult], Metrics | None]
"""What a hook does with a step; the metrics that it returns are added to the step's result."""

log = logging.getLogger(__name__)


class Hook:
    """Called on every rank after every step, and closed when the run ends, also by an exception."""

    def __call__(self, result: StepResult) -> Metrics | None:
        """Act on a step.

        Args:
            result: Result of the step, with the metrics of the hooks before this one.

        Returns:
            Metrics for the hooks after this one, or None.
        """
        raise NotImplementedError

    def on_stop(self, result: StepResult) -> None:
        """Act on the last step of a run that is stopped before its end; the hook was called with it before."""

    def close(self) -> None:
        """Close files and the like."""

    def failure(self) -> str | None:
        """Return a line about what went wrong during the run, such as lines that are not written; None: nothing did."""
        return None


class Every(Hook):
    """Hook that calls an action at an interval of steps, and after the last step.

    Args:
        steps: The interval; 0: after the last step only.
        action: A function, or another hook.
        at_end: Whether the action is called after the last step too.
        on_stop: Whether it is called when the run is stopped before its end.
    """

    def __init__(self, steps: int, action: Action, *, at_end: bool = True, on_stop: bool = False) -> None:
        self._steps, self._action, self._at_end, self._on_stop = steps, action, at_end, on_stop

    def __call__(self, result: StepResult) -> Metrics | None:
        """Call the action if it is due."""
        return self._action(result) if self._is_due(result) else None

    def on_stop(self, result: StepResult) -> None:
        """Call the action, unless it was called after this step."""
        if self._on_stop and not self._is_due(result):
            self._action(result)

    def close(self) -> None:
        """Close the action if it is a hook."""
        if isinstance(self._action, Hook):
            self._action.close()

    def failure(self) -> str | None:
        """Return the failure of the action if it is a hook."""
        return self._action.failure() if isinstance(self._action, Hook) else None

    def _is_due(self, result: StepResult) -> bool:
        return (self._steps > 0 and result.step % self._steps == 0) or (self._at_end and result.last)


class Monitor:
    """Log of steps: a file, TensorBoard or a progress bar. Wrapped in `BestEffort`, it cannot end a run."""

    def open(self) -> None:
        """Prepare for the first step."""

    def __call__(self, result: StepResult) -> None:
        """Record or show a step."""

    def close(self) -> None:
        """Finish after the last step."""


class BestEffort(Hook):
    """A monitor whose exceptions do not end the run: the first is logged, all are counted.

    The monitor is called at later steps all the same: a full disk may be emptied.

    Args:
        place: The file or folder, for messages.
        unit: What a call writes, in the plural, for messages.
        monitor: A monitor, which is opened here, or a function.
    """

    def __init__(self, place: object, unit: str, monitor: Monitor | Callable[[StepResult], None]) -> None:
        self._place, self._unit, self._monitor = place, unit, monitor
        self._calls = self._failures = 0
        self._reason: str | None = None
        if isinstance(monitor, Monitor):
            self._try(monitor.open)

    def __call__(self, result: StepResult) -> None:
        """Call the monitor."""
        self._calls += 1
        self._failures += not self._try(lambda: self._monitor(result))

    def close(self) -> None:
        """Close the monitor."""
        closed = not isinstance(self._monitor, Monitor) or self._try(self._monitor.close)
        if closed and not self._failures:
            self._reason = None  # open() failed, but nothing is missing

    def failure(self) -> str | None:
        """Return a line about what could not be written during the run; None where nothing is missing."""
        if self._reason is None:
            return None
        if not self._failures:
            return f"{self._place} could not be written ({self._reason})"
        return (
            f"{self._place}: {self._failures:,} of {self._calls:,} {self._unit} could not be written ({self._reason})"
        )

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            if self._reason is None:
                self._reason = reason(error)
                again = "training continues, and every write is tried again"
                log.warning(f"{self._place}: cannot be written: {self._reason}; {again}", extra=EVERY_RANK)
            return False
        return True


class SkippedStepLimit(Hook):
    """Hook that ends a run whose gradient is not finite in several consecutive steps: it will not recover.

    Args:
        limit: Consecutive skipped steps at which the run ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._skipped = limit, 0

    def __call__(self, result: StepResult) -> None:
        """Count consecutive skipped steps.

        Args:
            result: Result of the step.

        Raises:
            TrainingError: The limit is reached.
        """
        self._skipped = 0 if result.applied else self._skipped + 1
        if self._skipped >= self._limit:
            raise TrainingError(
                f"step {result.step}: the gradient norm is {result.grad_norm}, and {self._skipped} steps in a row "
                "were not finite and not applied. Lower optim.lr, or inspect the data of these steps"
            )


class WeightlessSteps(Hook):
    """Hook that tells of steps whose targets all have weight 0: they add nothing to the gradient.

    They happen by chance where few tokens have a weight, and always where the weights are wrong. So the run goes on,
    and the first, 10th, 100th, ... is told.
    """

    def __init__(self) -> None:
        self._steps = self._weightless = 0
        self._next = 1

    def __call__(self, result: StepResult) -> None:
        """Count a step, and log its number if it is the 1st, 10th, 100th, ... of its kind."""
        self._steps += 1
        if not result.losses.is_weightless:
            return
        self._weightless += 1
        if self._weightless == self._next:
            self._next *= 10
            log.warning(f"step {result.step}: {self._counted()}")

    def failure(self) -> str | None:
        """Return how many steps of how many added nothing; None where all did."""
        return self._counted() if self._weightless else None

    def _counted(self) -> str:
        return (
            f"{self._weightless:,} of {self._steps:,} steps have targets of weight 0 only (objective.token_weights, "
            "the objective's own weights), which add nothing to the gradient"
        )
