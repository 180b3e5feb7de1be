"""How often the host waits for the device: every wait leaves the device without work for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_VALUES = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}
_LISTS = {"tolist", "numpy"}


@dataclass
class HostWaits:
    """Waits of one step on this rank.

    Attributes:
        inside: from the first forward pass to the end of the last backward pass
        outside: before and after these
        micro_batches: forward passes
    """

    inside: int = 0
    outside: int = 0
    micro_batches: int = 0
    _before: int = field(default=0, repr=False)

    @property
    def per_micro_batch(self) -> float:
        """Waits of a micro-batch."""
        return self.inside / max(self.micro_batches, 1)

    @property
    def per_step(self) -> float:
        """Waits of a step that belong to no micro-batch."""
        return float(self.outside)


@contextlib.contextmanager
def counting_waits(engine: Any, device: torch.device) -> Iterator[HostWaits]:
    """Count while the body takes one step.

    On a GPU torch itself says which of its operations wait. On a CPU nothing waits; operations that hand a value to the
    host are counted, which on a GPU would wait. Copies to the device, which may wait as well, a CPU does not show.

    Args:
        engine: the DeepSpeed engine that takes the step.
        device: where it computes.
    """
    waits = HostWaits()
    source = _synchronizations() if device.type == "cuda" else _values_read()
    with source as count, _marks(engine, waits, count):
        yield waits
        waits.outside = count() - waits.inside


@contextlib.contextmanager
def _marks(engine: Any, waits: HostWaits, count: Callable[[], int]) -> Iterator[None]:
    """Enters the counts at the first forward pass and behind every backward pass."""

    def forward_begins(module: nn.Module, arguments: tuple) -> None:
        if not waits.micro_batches:
            waits._before = count()
        waits.micro_batches += 1

    backward = engine.backward

    def backward_then_count(*arguments: Any, **options: Any) -> Any:
        result = backward(*arguments, **options)
        waits.inside = count() - waits._before
        return result

    hook = engine.module.register_forward_pre_hook(forward_begins)
    engine.backward = backward_then_count
    try:
        yield
    finally:
        hook.remove()
        del engine.backward  # the class's own again


@contextlib.contextmanager
def _synchronizations() -> Iterator[Callable[[], int]]:
    """Torch's own account of operations that waited for the CUDA device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(entry.message) for entry in caught)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _values_read() -> Iterator[Callable[[], int]]:
    """Operations that hand a tensor's values to the host."""
    operations, lists = _Values(), _Lists()
    with operations, lists:
        yield lambda: operations.count + lists.count


class _Values(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "aten":
            self.count += function._schema.name.removeprefix("aten::") in _VALUES
        return function(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """`tolist` and `numpy` of a CPU tensor are no operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += getattr(function, "__name__", "") in _LISTS
        return function(*args, **(kwargs or {}))
