"""Memory of tensors on a CPU, whose allocator keeps no account: what is held, and what a profiled step adds at most.

(A process holds its libraries and what its allocator keeps for later too, so its size says little about a GPU's.)
"""

from __future__ import annotations

import contextlib
import gc

import torch
from torch.profiler import profile

_MEMORY_EVENT = "[memory]"


def held_bytes() -> int:
    """Bytes of all tensors that live in this process, each storage once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):  # isinstance would ask objects that warn when they are asked
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            # The tensors that torch.compile traces with have no memory: an address of 0, or an error.
            with contextlib.suppress(RuntimeError):
                if address := storage.data_ptr():
                    sizes[address] = storage.nbytes()
    return sum(sizes.values())


def peak_growth(recording: profile) -> int:
    """Most bytes that the tensors of a profiled body took on top of what was held before it.

    Args:
        recording: ended, made with profile_memory=True. Releases of what is older are not in it.
    """
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recording.profiler.kineto_results.events()
        if event.name() == _MEMORY_EVENT
    ]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak
