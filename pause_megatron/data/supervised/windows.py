"""Windows of task examples for supervised finetuning: packed or padded, with loss on the targets only.

Random draws are keyed by their address: the order of an epoch by (seed, task, epoch), and the number of pauses of an
example by (seed, task, epoch, example number). They do not depend on ranks, micro-batches or the step of a resume.
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
from pause_megatron.data.windows.boundaries import shared_positions
from pause_megatron.seeds import philox_key


class Epoch(NamedTuple):
    """One pass over the examples.

    Attributes:
        windows: The numbers of the examples of each window.
        counts: M of each example, int64 [examples].
    """

    windows: list[list[int]]
    counts: np.ndarray


class SupervisedWindows:
    """A map-style dataset of windows for StepLoader. Epochs follow each other without end.

    Args:
        examples: The encoded examples.
        arrangement: The layout of examples in windows.
        seed: Seed of the order and of the numbers of pauses.
        task: Name of the task, part of the key of the random draws.

    Raises:
        DataError: An example does not fit into a window. The message names it.
    """

    def __init__(self, examples: Sequence[EncodedExample], arrangement: Arrangement, *, seed: int, task: str) -> None:
        for example in examples:
            arrangement.check(example)
        self.examples, self.arrangement = examples, arrangement
        self._address = (seed, task)
        self._ends: list[int] = []  # number of windows up to the end of each epoch
        self._epochs: dict[int, Epoch] = {}  # the last two that were read; a plain dict, which can be pickled

    def __len__(self) -> int:
        return sys.maxsize  # another epoch always follows

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Return window `idx`.

        Args:
            idx: Number of the window over all epochs, from 0.

        Returns:
            tokens, labels and position_ids int64 [N], loss_mask fp32 [N], segments int32 [N]; with a bidirectional
            prefix, prefix bool [N]; with hints, hints int64 [hints, 3] (position, head or -1, target).
        """
        number, within = self.locate(idx)
        epoch = self.epoch(number)
        return self._window(epoch.windows[within], epoch.counts)

    def locate(self, window: int) -> tuple[int, int]:
        """Return the epoch of a window, and its number within that epoch."""
        while self._counted() <= window:
            self._count_another_epoch()
        number = bisect.bisect_right(self._ends, window)
        return number, window - (self._ends[number - 1] if number else 0)

    def epoch(self, number: int) -> Epoch:
        """Return the windows and the pause counts of an epoch, numbered from 0."""
        epoch = self._epochs.get(number)
        if epoch is None:  # the loader's thread may read at the same time: the dict is replaced, never changed
            epoch = self._make_epoch(number)
            self._epochs = {**dict(list(self._epochs.items())[-1:]), number: epoch}
        return epoch

    def windows_in_epochs(self, epochs: float) -> int:
        """Return the number of windows in `epochs` epochs; a fraction of an epoch is rounded up."""
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
        # One draw of 64 bits for each example: the draws of the first examples do not depend on the number of examples.
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
        hints: list[np.ndarray] = [np.zeros((0, 3), dtype=np.int64)]
        for segment, item in enumerate(items):
            ids, prefix_size = self.arrangement.arrange(self.examples[item], int(counts[item]))
            stop = start + ids.size - 1
            tokens[start:stop], segments[start:stop] = ids[:-1], segment
            positions[start:stop] = self._positions(int(counts[item]), prefix_size, stop - start)
            first = start + prefix_size - 1  # the last token of the prefix predicts the first target
            labels[first:stop], mask[first:stop] = ids[prefix_size:], 1.0
            prefix[start : first + 1] = True
            hints.append(self._hints(self.examples[item], int(counts[item]), prefix_size, start))
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
        if self.arrangement.hints is not None:
            sample["hints"] = np.concatenate(hints)
        return {name: torch.from_numpy(values) for name, values in sample.items()}

    def _positions(self, count: int, prefix_size: int, size: int) -> np.ndarray:
        """Return the position ids of an example's input tokens, int64 [size]."""
        if not self.arrangement.shared_positions:
            return np.arange(size)
        return shared_positions(self.arrangement.is_text(count, prefix_size, size)).numpy()

    def _hints(self, example: EncodedExample, count: int, prefix_size: int, start: int) -> np.ndarray:
        """Return (position in the window, head or -1, target) of each hint, int64 [hints, 3]."""
        positions = start + self.arrangement.hint_positions(example, count, prefix_size)
        heads = np.arange(positions.size) if self.arrangement.hints == "heads" else np.full(positions.size, -1)
        return np.stack([positions, heads, example.hints[: positions.size]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class EpochSummary:
    """Counts of the first epoch.

    Attributes:
        examples: Number of examples.
        windows: Number of windows.
        tokens: Input tokens, pauses included, padding excluded.
        pauses: Pauses (or fillers) among the input tokens.
        targets: Supervised targets of answers.
        hints: Supervised hints.
        padding: Fraction of the windows' positions that is padding.
        truncated: Examples whose prompt is truncated.
    """

    examples: int
    windows: int
    tokens: int
    pauses: int
    targets: int
    hints: int
    padding: float
    truncated: int


def summarize(data: SupervisedWindows) -> EpochSummary:
    """Count the examples, windows, tokens and padding of the first epoch."""
    epoch, arrangement = data.epoch(0), data.arrangement
    pairs = list(zip(data.examples, epoch.counts.tolist(), strict=True))
    tokens = sum(arrangement.length(example, count) for example, count in pairs)
    positions = len(epoch.windows) * arrangement.sequence_length
    return EpochSummary(
        examples=len(pairs),
        windows=len(epoch.windows),
        tokens=tokens,
        pauses=int(epoch.counts.sum()),
        targets=sum(example.target.size for example, _ in pairs),
        hints=sum(example.hints.size for example, _ in pairs) if arrangement.hints else 0,
        padding=1 - tokens / positions,
        truncated=sum(arrangement.prompt_tokens(example, count) < example.prompt.size for example, count in pairs),
    )
