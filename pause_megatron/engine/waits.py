"""Counting the synchronizations of a training step: the calls in which the host waits for the device.

While the host waits, it enqueues no kernels, and the device idles. A wait hides in harmless-looking Python: `.item()`,
`bool(tensor)`, `tensor.tolist()`, a boolean mask as an index, `torch.tensor(number, device=...)`, a copy from memory
that is not pinned. `HostWaits` counts these in all code that runs within it, including DeepSpeed and megatron-core. It
needs no GPU: on a CPU every tensor counts as one of the device. There it cannot tell whether memory is pinned, and in
a backward pass it sees only operators. On a GPU `torch.cuda.set_sync_debug_mode` reports all.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pause_megatron.distributed.transfer import to_device

MICRO_BATCH, STEP = "micro-batch", "step"
_phase = STEP


@contextlib.contextmanager
def in_micro_batch() -> Iterator[None]:
    """Mark the forward and backward passes of a step, so that waits within them are counted separately."""
    global _phase
    before, _phase = _phase, MICRO_BATCH
    try:
        yield
    finally:
        _phase = before


@dataclass(frozen=True)
class Wait:
    """One synchronization of the host with the device.

    Attributes:
        place: MICRO_BATCH or STEP.
        what: Operation.
        where: file:line of the Python call, outside of torch.
    """

    place: str
    what: str
    where: str


def upload(values: Sequence[float], device: torch.device) -> Tensor:
    """Copy numbers to the device as float64 [n], without a wait.

    Args:
        values: Numbers on the host.
        device: Target device.
    """
    return to_device(torch.tensor(values, dtype=torch.float64), device)


# Operators whose result on the host depends on values on the device.
_READING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Python calls without an operator: on a CPU they read memory directly.
_DOWNLOADING = {"tolist", "numpy", "__array__", "cpu"}
_UPLOADING = {"new_tensor"}
_FACTORIES = {"tensor", "as_tensor", "asarray", "from_numpy"}
_HOST = "_of_the_host"  # set on tensors, while counting
PLUMBING = {__file__}
"""Files that are skipped when the caller of a wait is looked up."""


def of_the_host(*tensors: Tensor | None) -> None:
    """Mark tensors that stay on the host, so that reading them is not a wait where the device is a CPU, too."""
    for tensor in tensors:
        if tensor is not None:
            setattr(tensor, _HOST, True)


class HostWaits:
    """A context manager that counts the waits of the code within.

    On a GPU it counts reads of tensors on the GPU, and copies that block (of memory that is not pinned, or not
    asynchronous). On a CPU a tensor counts as the host's where it was made by `torch.tensor(...)` without a device, or
    from such tensors only, until `.to(device)`; all others count as the device's. `.cpu()` counts as a copy from the
    device, `torch.tensor(..., device=...)` and `new_tensor` as copies to it. Calls that DeepSpeed makes on a GPU only
    (`torch.cuda.synchronize`, streams and events) are counted there only.

    Args:
        device: Device of the model; default: the GPU where there is one.

    Attributes:
        waits: The waits in their order.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device_type = torch.device(kind if device is None else device).type
        self.waits: list[Wait] = []
        self._inside = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HostWaits:
        self._stack.enter_context(_Calls(self))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_synchronizations(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def on_device(self, tensor: Tensor) -> bool:
        """Return whether the host would wait for the values of a tensor."""
        return tensor.device.type == self.device_type and not hasattr(tensor, _HOST)

    def note(self, what: str) -> None:
        """Count a wait, unless it is a part of one that is counted already."""
        if not self._inside:
            self.waits.append(Wait(_phase, what, _caller()))

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Count the body as one wait."""
        self.note(what)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def per(self, place: str, times: int) -> float:
        """Return the waits at a place, divided by how often it was passed.

        Args:
            place: MICRO_BATCH or STEP.
            times: Number of micro-batches or steps.
        """
        return sum(wait.place == place for wait in self.waits) / times

    def table(self) -> str:
        """Return a table of the waits, most frequent first, for a message or a report."""
        return "\n".join(
            f"{count:4d} x {wait.place}: {wait.what} at {wait.where}"
            for wait, count in Counter(self.waits).most_common()
        )


class _Operators(TorchDispatchMode):
    def __init__(self, record: HostWaits) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._waits(operator.overloadpacket.__name__, args, kwargs):
            self._record.note(str(operator.overloadpacket))
        result = operator(*args, **kwargs)
        lists = [a if isinstance(a, (list, tuple)) else [a] for a in args]
        tensors = [a for each in lists for a in each if isinstance(a, Tensor)]
        if isinstance(result, Tensor) and tensors and all(hasattr(t, _HOST) for t in tensors):
            setattr(result, _HOST, True)
        return result

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        on_device = any(isinstance(a, Tensor) and self._record.on_device(a) for a in args)
        if name in _READING:
            return on_device
        if name in _INDEXING:
            if name != "index" and args[2].numel() == 1 and args[2].device.type == "cpu":
                return False  # tensor[mask] = number does not read the mask on the host
            masks = (index for index in args[1] if index is not None)
            return on_device and any(index.dtype in (torch.bool, torch.uint8) for index in masks)
        if name == "repeat_interleave":
            return on_device and kwargs.get("output_size") is None
        if name in ("_to_copy", "copy_"):
            return _copy_waits(name, args, kwargs)
        return False


def _copy_waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a copy between host and GPU blocks: it does unless it is asynchronous and pinned."""
    source = args[1] if name == "copy_" else args[0]
    target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
    if {source.device.type, target.type} != {"cpu", "cuda"}:
        return False
    if not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
        return True
    return not any(torch.cuda.is_available() and t.device.type == "cpu" and t.is_pinned() for t in args[:2])


class _Calls(TorchFunctionMode):
    def __init__(self, record: HostWaits) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if self._waits(name, args, kwargs):
            with self._record.noted(name):
                return function(*args, **kwargs)
        blocking = not kwargs.get("non_blocking", False)
        if name == "to" and blocking and hasattr(args[0], _HOST) and _names_a_device(args, kwargs):
            # A blocking copy waits, pinned or not.
            self._record.note("to(device) of the host's numbers, blocking")
        result = function(*args, **kwargs)
        made_of_numbers = name in _FACTORIES and not isinstance(args[0] if args else None, Tensor)
        on_host = made_of_numbers and kwargs.get("device") is None
        if on_host or (name in _UPLOADING and hasattr(args[0], _HOST)):
            setattr(result, _HOST, True)
        elif name == "to" and hasattr(result, _HOST):
            delattr(result, _HOST)  # on a CPU it may be the same tensor
        return result

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in _DOWNLOADING or name in _UPLOADING:
            return isinstance(args[0], Tensor) and self._record.on_device(args[0])
        if name in _FACTORIES and not isinstance(args[0] if args else None, Tensor):
            device = kwargs.get("device")
            return device is not None and torch.device(device).type == self._record.device_type
        return False


def _names_a_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return "device" in kwargs or any(isinstance(argument, (torch.device, str)) for argument in args[1:])


@contextlib.contextmanager
def _synchronizations(record: HostWaits) -> Iterator[None]:
    """Count calls without an operator: `synchronize` of the device, a stream, an event."""
    owners: tuple[tuple[Any, str], ...] = (
        (torch.cuda, "torch.cuda"),
        (torch.cuda.Stream, "Stream"),
        (torch.cuda.Event, "Event"),
    )
    originals: list[tuple[Any, Callable[..., Any]]] = []
    for owner, label in owners:
        original = owner.synchronize
        originals.append((owner, original))

        def counted(*args: Any, _original: Callable[..., Any] = original, _label: str = label, **kwargs: Any) -> Any:
            with record.noted(f"{_label}.synchronize"):
                return _original(*args, **kwargs)

        owner.synchronize = counted
    try:
        yield
    finally:
        for owner, original in originals:
            owner.synchronize = original


def _caller() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not (name in PLUMBING or "/torch/" in name or name.endswith("contextlib.py")):
            return f"{name.partition('site-packages/')[2] or name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
