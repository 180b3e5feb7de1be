"""Batches of the steps to come, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.errors import ConfigError

Step = tuple[int, list[MicroBatch]]


class Samples(Protocol):
    """What the loader reads from: a PauseGPTDataset, a BlendedDataset, or anything of their shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> Mapping[str, torch.Tensor]: ...


class StepLoader:
    """Iterates over (step, this rank's micro-batches) for the steps first_step, ..., end_step - 1. Once.

    A thread reads `prefetch` steps ahead (numpy and memory maps release the interpreter where it matters, and a
    window costs tens of microseconds, so processes would cost more than they save). What goes wrong in the thread is
    raised where the batch is asked for. What comes out is independent of `prefetch`.

    Use as a context manager, or call `close()`: it stops the thread wherever it is, and may be called twice.

    Args:
        dataset: Sample number -> sample.
        sampler: Step -> sample numbers of this rank.
        first_step: First step, from 0.
        end_step: One past the last step.
        prefetch: Steps read ahead; 0 reads when asked, without a thread.
        pause_ids: The pause ids, for `collate`.
        device: Where the micro-batches go. For a GPU each is put into one pinned buffer (by the thread).

    Raises:
        ConfigError: the dataset holds fewer samples than the steps need.
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
    ) -> None:
        needed = end_step * sampler.global_size
        if first_step < end_step and needed > len(dataset):
            raise ConfigError(
                f"train.steps: {end_step} steps of batch.global_size={sampler.global_size} need {needed} samples, "
                f"the dataset was built with {len(dataset)}"
            )
        self._dataset = dataset
        self._sampler = sampler
        self._pause_ids = pause_ids
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._steps = iter(range(first_step, end_step))
        self._stopped = threading.Event()
        self._ready: queue.Queue[Step | BaseException | None] | None = None
        self._thread: threading.Thread | None = None
        if prefetch > 0:
            self._ready = queue.Queue(maxsize=prefetch)
            self._thread = threading.Thread(target=self._read_ahead, name="step-loader", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._stopped.is_set():
            raise StopIteration
        if self._ready is None:
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
        """Stops reading ahead and waits for the thread. Iteration then ends."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, step: int) -> Step:
        batches = [
            collate([self._dataset[number] for number in numbers], sample_ids=numbers, pause_ids=self._pause_ids)
            for numbers in self._sampler.indices(step)
        ]
        return step, batches if self._gpu is None else [batch.packed(pinned=True) for batch in batches]

    def _read_ahead(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # a thread begins on the first GPU, and pinning is done by one
            for step in self._steps:
                if self._stopped.is_set() or not self._put(self._read(step)):
                    return
            self._put(None)
        except BaseException as error:  # handed over, whatever it is: a silent thread would hang the run
            self._put(error)

    def _put(self, item: Step | BaseException | None) -> bool:
        """Waits for room. False if the loader was closed meanwhile."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
