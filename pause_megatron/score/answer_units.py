"""Units of the answers of a task: examples in batches of similar length, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pause_megatron.data.supervised.examples import EncodedExample
from pause_megatron.score.units import Batch


@dataclass(frozen=True)
class Answer:
    """An example, as the model reads it.

    Attributes:
        number: Its number among the examples.
        id: Its name, for messages.
        row: Ids of its prompt and its target, int64.
        targets: Number of tokens of its target, which get values.
    """

    number: int
    id: str
    row: np.ndarray
    targets: int

    @property
    def read(self) -> int:
        """Number of its tokens that the model reads: the last target is never read."""
        return self.row.size - 1


@dataclass(frozen=True)
class AnswerUnit:
    """Batches of examples that one process scores.

    Attributes:
        number: Its number, from 0.
        groups: The examples of each batch, the longest first.
    """

    number: int
    groups: tuple[tuple[Answer, ...], ...]

    @property
    def answers(self) -> list[Answer]:
        """Its examples, in the order of its values."""
        return [answer for group in self.groups for answer in group]

    def __len__(self) -> int:
        return sum(answer.targets for answer in self.answers)

    def __str__(self) -> str:
        return f"unit {self.number:,} ({len(self.answers):,} examples, from {self.answers[0].id})"

    def place(self, at: int) -> str:
        """Return what a value is of, for messages.

        Args:
            at: Its place among those of the unit.
        """
        answers = self.answers
        ends = np.cumsum([answer.targets for answer in answers])
        return f"example {answers[int(np.searchsorted(ends, at, side='right'))].id}"

    def batches(self) -> Iterator[Batch]:
        """Yield its batches."""
        begin = 0
        for group in self.groups:
            inputs = np.zeros((len(group), group[0].read), dtype=np.int64)
            targets, scored = np.zeros_like(inputs), np.zeros(inputs.shape, dtype=bool)
            for at, answer in enumerate(group):
                inputs[at, : answer.read], targets[at, : answer.read] = answer.row[:-1], answer.row[1:]
                scored[at, answer.read - answer.targets : answer.read] = True
            count = int(scored.sum())
            yield Batch(inputs, targets, scored, np.arange(begin, begin + count))
            begin += count


def answer_units(
    rows: Sequence[np.ndarray], encoded: Sequence[EncodedExample], batch_tokens: int, size: int
) -> Iterator[AnswerUnit]:
    """Yield the units of examples, those of the longest first, as memory may not suffice.

    Args:
        rows: The ids of each example, prompt and target.
        encoded: The examples.
        batch_tokens: Largest number of tokens of a batch, padding included; at least the longest row.
        size: Approximate number of tokens of a unit; no batch is divided.
    """
    answers = [
        Answer(number, example.id, row, example.target.size)
        for number, (row, example) in enumerate(zip(rows, encoded, strict=True))
    ]
    number, read = 0, 0
    groups: list[tuple[Answer, ...]] = []
    for group in _batches(answers, batch_tokens):
        groups.append(group)
        read += len(group) * group[0].read
        if read >= size:
            yield AnswerUnit(number, tuple(groups))
            number, read, groups = number + 1, 0, []
    if groups:
        yield AnswerUnit(number, tuple(groups))


def in_order(units: Sequence[AnswerUnit], values: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Return the values of each example, in the order of the examples.

    Args:
        units: All units.
        values: The values of each unit.
    """
    found: dict[int, np.ndarray] = {}
    for unit, part in zip(units, values, strict=True):
        ends = np.cumsum([answer.targets for answer in unit.answers])
        found |= zip((answer.number for answer in unit.answers), np.split(part, ends[:-1]), strict=True)
    return [found[number] for number in range(len(found))]


def _batches(answers: Sequence[Answer], batch_tokens: int) -> Iterator[tuple[Answer, ...]]:
    batch: list[Answer] = []
    for answer in sorted(answers, key=lambda answer: (-answer.read, answer.number)):
        if batch and (len(batch) + 1) * batch[0].read > batch_tokens:
            yield tuple(batch)
            batch = []
        batch.append(answer)
    yield tuple(batch)
