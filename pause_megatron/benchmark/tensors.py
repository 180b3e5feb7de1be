"""Memory of tensors on a CPU, whose allocator has no statistics: live bytes, and the peak of a profiled step.

The size of the process would include its libraries and what its allocator keeps.
"""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
from torch.profiler import profile

_MEMORY_EVENT = "[memory]"


def held_bytes() -> int:
    """Return the bytes of all live tensors of this process, each storage once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):  # isinstance reads __class__, at which some objects warn
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            # Tensors of torch.compile's tracing have no memory: an address of 0, or an error.
            with contextlib.suppress(RuntimeError):
                if address := storage.data_ptr():
                    sizes[address] = storage.nbytes()
    return sum(sizes.values())


def peak_growth(recording: profile) -> int:
    """Return the peak bytes of tensors in a profiled body, beyond those that were live before it.

    Args:
        recording: Finished profiler with profile_memory=True; it has no releases of older tensors.
    """
    profiler: Any = recording.profiler  # kineto's results have no public type
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == _MEMORY_EVENT
    ]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak
