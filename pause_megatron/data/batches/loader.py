"""The loader of a data-parallel rank: micro-batches step by step, prefetched by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.errors import ConfigError
from pause_megatron.objective import LossPlan

Step = tuple[int, list[MicroBatch]]
"""The number of an optimizer step and this rank's micro-batches in it."""


class Samples(Protocol):
    """A map-style dataset of windows, such as PauseGPTDataset or BlendedDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> Mapping[str, torch.Tensor]: ...


class StepLoader:
    """An iterator over (step, this rank's micro-batches) for the steps first_step, ..., end_step - 1. It runs once.

    A thread prefetches `prefetch` steps. Worker processes would cost more than they save: a window takes tens of
    microseconds, and numpy releases the GIL in the expensive parts. An error in the thread is raised by `next`. The
    micro-batches do not depend on `prefetch`.

    Use it as a context manager, or call `close()`, which stops the thread and may be called twice.

    Args:
        dataset: The windows, by global sample number.
        sampler: The sampler of this data-parallel rank.
        first_step: First step, from 0.
        end_step: One past the last step.
        prefetch: Steps to prefetch. 0: no thread; each step is read by `next`.
        pause_ids: The K pause ids.
        device: Device of the model. For a GPU, the thread puts each micro-batch into one pinned buffer.
        plan: As in `collate`.

    Raises:
        ConfigError: The dataset holds fewer samples than the steps need.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: StepSampler,
        first_step: int,
        end_step: int,
        prefetch: int = 2,
        *,
        pause_ids: range,
        device: torch.device | None = None,
        plan: LossPlan | None = None,
    ) -> None:
        needed = end_step * sampler.global_size
        if first_step < end_step and needed > len(dataset):
            raise ConfigError(
                f"train.steps: expected a dataset of {needed} samples or more for {end_step} steps of "
                f"batch.global_size={sampler.global_size}, got one of {len(dataset)}"
            )
        self._dataset = dataset
        self._sampler = sampler
        self._pause_ids, self._plan = pause_ids, plan
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._steps = iter(range(first_step, end_step))
        self._stopped = threading.Event()
        self._ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._thread: threading.Thread | None = None
        if prefetch > 0:
            self._thread = threading.Thread(target=self._prefetch, name="step-loader", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._stopped.is_set():
            raise StopIteration
        if self._thread is None:
            return self._read(next(self._steps))
        item = self._ready.get()
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it. Iteration then ends."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, step: int) -> Step:
        batches = [
            collate(
                [self._dataset[number] for number in numbers],
                sample_ids=numbers,
                pause_ids=self._pause_ids,
                plan=self._plan,
            )
            for numbers in self._sampler.indices(step)
        ]
        return step, batches if self._gpu is None else [batch.packed(pinned=True) for batch in batches]

    def _prefetch(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # the current device is per thread, and pinning initializes it
            for step in self._steps:
                if self._stopped.is_set() or not self._put(self._read(step)):
                    return
            self._put(None)
        except BaseException as error:  # of every kind: without it, `next` would wait forever
            self._put(error)

    def _put(self, item: Step | BaseException | None) -> bool:
        """Wait for room in the queue. Return False if the loader was closed meanwhile."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
