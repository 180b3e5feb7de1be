"""Few-shot prompts: solved examples of another split before the prompt. Pauses follow the whole prompt only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydantic import Field

from pause_megatron.config.section import Section
from pause_megatron.errors import DataError
from pause_megatron.tasks.task import Example

_SPARE = 16


class FewShot(Section):
    """Solved examples that each prompt begins with."""

    count: int = Field(ge=1, description="examples before each prompt")
    from_: str | None = Field(None, alias="from", min_length=1, description="dataset's split; default: that of train")
    seed: int = Field(0, ge=0, description="seed of the draw")
    separator: str = Field("\n\n", min_length=1, description="text after each example")


def with_shots(
    examples: Sequence[Example], pool: Sequence[Example], *, count: int, seed: int = 0, separator: str = "\n\n"
) -> list[Example]:
    """Return the examples with `count` solved examples of a pool before each prompt.

    They are drawn for each example by the seed and the example's id, so they depend on no other example. Examples of
    the pool with the same prompt or group as the example itself are not drawn.

    Args:
        examples: The examples.
        pool: Examples to draw from: training examples, never those of the evaluation.
        count: Solved examples before each prompt.
        seed: Seed of the draw.
        separator: Text after each of them.

    Raises:
        DataError: The pool has too few other examples.
    """
    return [_with_shots(example, pool, count, seed, separator) for example in examples]


def _with_shots(example: Example, pool: Sequence[Example], count: int, seed: int, separator: str) -> Example:
    order = _order(random.Random(f"{seed} {example.id}"), len(pool), count)
    shots: list[str] = []
    while len(shots) < count:
        index = next(order, None)
        if index is None:
            raise DataError(
                f"few_shot: expected {count} examples besides {example.id!r} to draw from, got {len(shots)}"
            )
        other = pool[index]
        same_group = example.group != "" and other.group == example.group
        if other.prompt != example.prompt and not same_group:
            shots.append(other.prompt + other.target)
    return replace(example, prompt=separator.join([*shots, example.prompt]))


def _order(draw: random.Random, size: int, count: int) -> Iterator[int]:
    """Yield all indices of a pool in a random order; usually only the first few are needed."""
    first = draw.sample(range(size), min(size, count + _SPARE))
    yield from first
    rest = sorted(set(range(size)) - set(first))
    draw.shuffle(rest)
    yield from rest
