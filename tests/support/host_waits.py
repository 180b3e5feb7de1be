"""Host waits of real training steps, counted on a CPU.

`HostWaits` sees what the code does with tensors. DeepSpeed waits in another way besides, for streams and events,
and only where its accelerator says that it works asynchronously: `asynchronous_accelerator` lets the CPU's say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from pause_megatron.engine.waits import MICRO_BATCH, PLUMBING, STEP, HostWaits, Wait, of_the_host

PLUMBING.add(__file__)


class _Queue:
    """Takes the place of the device, a stream or an event, and enters it as a wait when the host waits for it."""

    waits: HostWaits | None = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None:
        if self.waits is not None:
            self.waits.note(type(self).__name__)

    def query(self) -> bool:
        return False  # the device is behind

    def nothing(self, *_: Any, **__: Any) -> None: ...

    record = wait_event = wait_stream = wait = nothing


class Device(_Queue): ...


class Stream(_Queue): ...


class Event(_Queue):
    """DeepSpeed waits for events some gathers back, to bound its memory: the device has work meanwhile."""

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def asynchronous_accelerator() -> Iterator[None]:
    """Lets DeepSpeed take the paths of a GPU, streams and all, on CPU tensors. Build the engine within."""
    from deepspeed.accelerator import get_accelerator

    accelerator, device, stream = type(get_accelerator()), Device(), Stream()
    answers = {
        **{name: lambda self: False for name in ("is_synchronized_device", "resolves_data_dependency")},
        "handles_memory_backpressure": lambda self: False,
        "stream": lambda self, stream: contextlib.nullcontext(),
        "current_stream": lambda self, index=None: stream,
        "default_stream": lambda self, index=None: stream,
        "synchronize": lambda self, index=None: device.synchronize(),
        "Stream": property(lambda self: Stream),
        "Event": property(lambda self: Event),
        "FloatTensor": property(lambda self: lambda values: torch.tensor(values, dtype=torch.float, device="cpu")),
        "ByteTensor": property(lambda self: lambda values: torch.tensor(values, dtype=torch.uint8, device="cpu")),
    }
    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(accelerator, name, answer))
        patches.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        yield


def waits_of_steps(overrides: Sequence[str], steps: int = 2) -> dict[str, Any]:
    """Trains on random windows and counts in the steps behind the first.

    Returns:
        "micro_batch": waits within a micro-batch; "step": within a step, besides those (both averages over the counted
        steps); "table": which; "losses": of all steps.
    """
    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize
    from pause_megatron.train.guards.signals import StopRequest
    from pause_megatron.train.loop import StepSchedule, training_steps
    from support.measured import new_engine_of, random_batches

    config = load(overrides=[*overrides, f"train.steps={steps}"])
    with asynchronous_accelerator(), initialize(config.parallel, device="cpu") as context:
        engine, _ = new_engine_of(config, context)
        batches = random_batches(config, context)
        for batch in batches:
            of_the_host(batch.segments, batch.prefix)
        losses, record = [], HostWaits()
        with engine:
            results = training_steps(
                engine,
                ((step, batches) for step in range(steps)),
                context,
                StepSchedule(config.optim, steps),
                StopRequest(),
            )
            losses.append(next(results).losses.mean)
            _Queue.waits = record
            try:
                with record:
                    losses += [result.losses.mean for result in results]
            finally:
                _Queue.waits = None
    counted = steps - 1
    return {
        "micro_batch": record.per(MICRO_BATCH, counted * len(batches)),
        "step": record.per(STEP, counted),
        "table": record.table(),
        "losses": losses,
    }


def waits_of(function: Any) -> list[Wait]:
    """The waits of one call."""
    with HostWaits() as record:
        function()
    return record.waits
