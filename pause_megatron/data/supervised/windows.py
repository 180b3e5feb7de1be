"""Windows of task examples for supervised finetuning: packed or padded, with loss on the targets only.

Random draws are keyed by their address: the order of an epoch by (seed, task, epoch), and the pauses of an example by
(seed, task, epoch, example number). They do not depend on ranks, micro-batches or the step of a resume.
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

from pause_megatron.data.supervised.answers import NO_GAPS
from pause_megatron.data.supervised.examples import Arrangement, EncodedExample
from pause_megatron.data.supervised.packing import pack
from pause_megatron.data.windows.boundaries import shared_positions
from pause_megatron.seeds import philox_key


class Epoch(NamedTuple):
    """One pass over the examples.

    Attributes:
        windows: The numbers of the examples of each window.
        counts: M of each example, int64 [examples].
        answers: The gaps of the pauses within the answer of each example; empty where no answer has pauses.
    """

    windows: list[list[int]]
    counts: np.ndarray
    answers: Sequence[np.ndarray] = ()

    def pauses(self, item: int) -> tuple[int, np.ndarray]:
        """Return M of an example, and the gaps of the pauses within its answer.

        Args:
            item: Number of the example.
        """
        return int(self.counts[item]), self.answers[item] if self.answers else NO_GAPS


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
        return self._window(epoch.windows[within], epoch)

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
        epoch = Epoch([[item] for item in order.tolist()], counts, self._answers(number))
        if self.arrangement.batching == "padded":
            return epoch
        lengths = [self.arrangement.length(self.examples[item], *epoch.pauses(item)) for item in order.tolist()]
        packed = pack(lengths, self.arrangement.sequence_length)
        return epoch._replace(windows=[[int(order[item]) for item in items] for items in packed])

    def _answers(self, epoch: int) -> Sequence[np.ndarray]:
        answers = self.arrangement.answers
        if answers is None:
            return ()
        gaps = [
            answers.gaps(example.target[:-1], *self._address, epoch, number=number, values=example.values)
            for number, example in enumerate(self.examples)
        ]
        for example, each in zip(self.examples, gaps, strict=True):
            self.arrangement.check_room(example, each.size)
        return gaps

    def _generator(self, purpose: str, epoch: int) -> np.random.Generator:
        key = philox_key(*self._address, purpose, epoch)
        return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))

    def _window(self, items: Sequence[int], epoch: Epoch) -> dict[str, torch.Tensor]:
        size = self.arrangement.sequence_length
        tokens, labels, positions = (np.zeros(size, dtype=np.int64) for _ in range(3))
        mask, segments = np.zeros(size, dtype=np.float32), np.full(size, -1, dtype=np.int32)
        prefix, start = np.zeros(size, dtype=bool), 0
        hints: list[np.ndarray] = [np.zeros((0, 3), dtype=np.int64)]
        for segment, item in enumerate(items):
            example, (count, gaps) = self.examples[item], epoch.pauses(item)
            ids, prefix_size = self.arrangement.arrange(example, count, gaps)
            stop = start + ids.size - 1
            tokens[start:stop], segments[start:stop] = ids[:-1], segment
            positions[start:stop] = self._positions(example, count, prefix_size, gaps)
            first = start + prefix_size - 1  # the last token of the prefix predicts the first target
            is_target = self.arrangement.answer(example, gaps).is_text
            labels[first:stop][is_target], mask[first:stop] = example.target, is_target
            prefix[start : first + 1] = True
            hints.append(self._hints(example, count, prefix_size, start))
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

    def _positions(self, example: EncodedExample, count: int, prefix_size: int, gaps: np.ndarray) -> np.ndarray:
        """Return the position ids of an example's input tokens, int64 [length]."""
        is_text = self.arrangement.is_text(example, count, prefix_size, gaps)[:-1]
        return shared_positions(is_text).numpy() if self.arrangement.shared_positions else np.arange(is_text.size)

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
        pauses_in_answers: Those of them that are within the answers.
        targets: Supervised targets of answers.
        hints: Supervised hints.
        padding: Fraction of the windows' positions that is padding.
        truncated: Examples whose prompt is truncated.
    """

    examples: int
    windows: int
    tokens: int
    pauses: int
    pauses_in_answers: int
    targets: int
    hints: int
    padding: float
    truncated: int


def summarize(data: SupervisedWindows) -> EpochSummary:
    """Count the examples, windows, tokens and padding of the first epoch."""
    epoch, arrangement = data.epoch(0), data.arrangement
    drawn = [(example, *epoch.pauses(item)) for item, example in enumerate(data.examples)]
    tokens, within = sum(arrangement.length(*each) for each in drawn), sum(gaps.size for *_, gaps in drawn)
    positions = len(epoch.windows) * arrangement.sequence_length
    return EpochSummary(
        examples=len(drawn),
        windows=len(epoch.windows),
        tokens=tokens,
        pauses=int(epoch.counts.sum()) + within,
        pauses_in_answers=within,
        targets=sum(example.target.size for example, *_ in drawn),
        hints=sum(example.hints.size for example, *_ in drawn) if arrangement.hints else 0,
        padding=1 - tokens / positions,
        truncated=sum(arrangement.prompt_tokens(*each) < each[0].prompt.size for each in drawn),
    )
