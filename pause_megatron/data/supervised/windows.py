"""Task examples -> windows with loss on the targets alone, packed or padded; epoch follows epoch.

Randomness is addressed: the order of an epoch is a function of (seed, task, epoch), an example's number of pauses of
(seed, task, epoch, example number). Ranks, micro-batches and the point of a resume do not matter.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pause_megatron.data.supervised.examples import Arrangement, EncodedExample
from pause_megatron.data.supervised.packing import pack
from pause_megatron.seeds import philox_key


class Epoch(NamedTuple):
    """One pass over the examples.

    Attributes:
        windows: For each window the numbers of its examples.
        counts: int64 [examples], the M of each example.
    """

    windows: list[list[int]]
    counts: np.ndarray


class SupervisedWindows:
    """Window number -> sample, for StepLoader; epoch follows epoch without a gap and without an end.

    Args:
        examples: What to learn.
        arrangement: How examples lie in windows.
        seed: Of the order and of the drawn pauses.
        task: Name of the task; another task draws differently.

    Raises:
        DataError: an example that does not fit; it is named.
    """

    def __init__(self, examples: Sequence[EncodedExample], arrangement: Arrangement, *, seed: int, task: str) -> None:
        for example in examples:
            arrangement.check(example)
        self.examples, self.arrangement = examples, arrangement
        self._address = (seed, task)
        self._ends: list[int] = []  # number of windows up to the end of each epoch
        self._epochs: dict[int, Epoch] = {}  # the last two that were asked for; a plain dict, which workers can be sent

    def __len__(self) -> int:
        return sys.maxsize  # another epoch always follows

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Window `idx`: tokens, labels, position_ids int64 [N], loss_mask fp32 [N], segments int32 [N] and, where the
        prefix is bidirectional, prefix bool [N]."""
        number, within = self.locate(idx)
        epoch = self.epoch(number)
        return self._window(epoch.windows[within], epoch.counts)

    def locate(self, window: int) -> tuple[int, int]:
        """(epoch, number within it) of a window."""
        while self._counted() <= window:
            self._count_another_epoch()
        number = bisect.bisect_right(self._ends, window)
        return number, window - (self._ends[number - 1] if number else 0)

    def epoch(self, number: int) -> Epoch:
        """The windows and the pauses of an epoch, from 0."""
        epoch = self._epochs.get(number)
        if epoch is None:  # a loader's thread may ask at the same time: the dict is replaced, never changed
            epoch = self._make_epoch(number)
            self._epochs = {**dict(list(self._epochs.items())[-1:]), number: epoch}
        return epoch

    def windows_in_epochs(self, epochs: float) -> int:
        """Windows of so many epochs; a part of an epoch is rounded up."""
        while len(self._ends) < epochs:
            self._count_another_epoch()
        whole = int(epochs)
        before, rest = self._ends[whole - 1] if whole else 0, epochs - whole
        return before + (math.ceil(rest * (self._ends[whole] - before)) if rest else 0)

    def _counted(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _count_another_epoch(self) -> None:
        self._ends.append(self._counted() + len(self.epoch(len(self._ends)).windows))

    def _make_epoch(self, number: int) -> Epoch:
        draw, size = self._generator("pauses", number), len(self.examples)
        choices = self.arrangement.pauses
        # One draw of 64 bits an example: another number of examples does not move the others' draws.
        counts = choices.start + (draw.random(size) * len(choices)).astype(np.int64)
        order = self._generator("order", number).permutation(size)
        if self.arrangement.batching == "padded":
            return Epoch([[item] for item in order.tolist()], counts)
        lengths = [self.arrangement.length(self.examples[item], int(counts[item])) for item in order]
        packed = pack(lengths, self.arrangement.sequence_length)
        return Epoch([[int(order[item]) for item in items] for items in packed], counts)

    def _generator(self, purpose: str, epoch: int) -> np.random.Generator:
        key = philox_key(*self._address, purpose, epoch)
        return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))

    def _window(self, items: Sequence[int], counts: np.ndarray) -> dict[str, torch.Tensor]:
        size = self.arrangement.sequence_length
        tokens, labels, positions = (np.zeros(size, dtype=np.int64) for _ in range(3))
        mask, segments = np.zeros(size, dtype=np.float32), np.full(size, -1, dtype=np.int32)
        prefix, start = np.zeros(size, dtype=bool), 0
        for segment, item in enumerate(items):
            whole, marked = self.arrangement.lay(self.examples[item], int(counts[item]))
            stop = start + whole.size - 1
            tokens[start:stop], segments[start:stop] = whole[:-1], segment
            positions[start:stop] = np.arange(stop - start)
            first = start + marked - 1
            labels[first:stop], mask[first:stop] = whole[marked:], 1.0
            prefix[start : first + 1] = True
            start = stop
        sample = {
            "tokens": tokens,
            "labels": labels,
            "position_ids": positions,
            "loss_mask": mask,
            "segments": segments,
        }
        if self.arrangement.prefix_attention == "bidirectional":
            sample["prefix"] = prefix
        return {name: torch.from_numpy(values) for name, values in sample.items()}


@dataclass(frozen=True)
class Summary:
    """The first epoch in numbers.

    Attributes:
        examples, windows: How many.
        tokens: Input tokens, pauses included, padding not.
        pauses, targets: Of them pauses (or fillers); supervised targets.
        padding: Share of the windows' places that is padding.
        truncated: Examples whose prompt is cut.
    """

    examples: int
    windows: int
    tokens: int
    pauses: int
    targets: int
    padding: float
    truncated: int


def summarize(data: SupervisedWindows) -> Summary:
    """Counts the first epoch."""
    epoch, arrangement = data.epoch(0), data.arrangement
    pairs = list(zip(data.examples, epoch.counts.tolist(), strict=True))
    tokens = sum(arrangement.length(example, count) for example, count in pairs)
    places = len(epoch.windows) * arrangement.sequence_length
    return Summary(
        examples=len(pairs),
        windows=len(epoch.windows),
        tokens=tokens,
        pauses=int(epoch.counts.sum()),
        targets=sum(example.target.size for example, _ in pairs),
        padding=1 - tokens / places,
        truncated=sum(arrangement.prompt_tokens(example, count) < example.prompt.size for example, count in pairs),
    )
