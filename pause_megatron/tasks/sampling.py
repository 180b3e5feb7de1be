"""Samples of examples that represent every group, and the held-out part of a train split.

Datasets are ordered by article or story: their first 200 records may be two articles. A sample takes every group's
share instead. Draws are keyed by group and id, not by a run's seed, so that all models see the same records.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from pause_megatron.errors import ConfigError
from pause_megatron.seeds import address_digest
from pause_megatron.tasks.task import Example

log = logging.getLogger(__name__)


def sample(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return a random sample in which every group has its share of the examples, in their order.

    The examples of a group are shuffled and spread evenly over [0, 1), from a random start; the sample is the `limit`
    lowest positions. A group of m among n examples gets m * limit / n of them, rounded up or down (nearly: the
    roundings add up to `limit`). Every example is as likely as any other, and a larger limit contains a smaller one.

    Args:
        examples: The examples; those without a group are groups of their own.
        limit: Number of examples; None, or at least as many as there are, returns all.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    position: dict[int, tuple[float, str]] = {}
    for group, numbers in _groups(examples).items():
        start = _draw("sample", group)
        shuffled = sorted(numbers, key=lambda number: (_draw("order", group, examples[number].id), number))
        for rank, number in enumerate(shuffled):
            position[number] = (rank + start) / len(numbers), group
    chosen = sorted(position, key=position.__getitem__)[:limit]
    return [examples[number] for number in sorted(chosen)]


def divide(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and those held out, each in their order. No group is in both.

    Groups are held out in a random order until they have `fraction` of the examples. A group that would make it more
    than twice as many is left to training. If all groups are that large, the smallest is held out, with a warning.

    Args:
        examples: The examples of the train split.
        fraction: Part that is held out, above 0 and below 1.

    Raises:
        ConfigError: All examples are of one group.
    """
    groups = _groups(examples)
    if len(groups) < 2:
        raise ConfigError(
            f"task.held_out={fraction:g}: expected training examples of 2 groups or more, got {len(examples):,} of one "
            "group; task.held_out=0 holds out none"
        )
    held: set[int] = set()
    wanted, order = fraction * len(examples), sorted(groups, key=lambda group: _draw("held out", group))
    for group in order:
        if len(held) < wanted and len(held) + len(groups[group]) <= min(max(2 * wanted, 1), len(examples) - 1):
            held.update(groups[group])
    if not held:
        smallest = min(order, key=lambda group: len(groups[group]))
        held.update(groups[smallest])
        log.warning(
            "task.held_out=%g: expected groups of at most %d examples, got larger ones only; %d of %d are held out",
            *(fraction, max(2 * wanted, 1), len(held), len(examples)),
        )
    parts: tuple[list[Example], list[Example]] = ([], [])
    for number, example in enumerate(examples):
        parts[number in held].append(example)
    return parts


def _groups(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Return the numbers of the examples of each group, by a name that is unique to it."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        groups[f"group {example.group}" if example.group else f"id {example.id}"].append(number)
    return groups


def _draw(*address: object) -> float:
    """Return a number in [0, 1) that depends on the address only."""
    # An id or text from outside may hold a NUL, which separates the parts of an address.
    parts = (str(part).replace("\0", "\\0") for part in address)
    return int.from_bytes(address_digest("tasks.sampling", *parts, size=8), "little") / 2**64
