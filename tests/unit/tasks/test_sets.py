"""The task of two sets that meet at a shift: answers, hints and splits."""

from __future__ import annotations

from itertools import islice

import pytest

from pause_megatron.tasks.synthetic.sets import MEETING_OF_7, SIZES


def test_answers_and_hints_are_those_of_the_definition():
    examples = MEETING_OF_7.examples("eval")
    for example in examples[:500]:
        text = example.prompt.removesuffix("=")
        x, y, shift = text[:7], text[7:21], int(text[21:]) - 2
        assert 0 <= shift < 8 and len(example.prompt) == 23
        sums = [int(x[j]) + int(y[j + shift]) for j in range(7)]
        assert example.hints == tuple(map(str, sums))
        assert example.target == str(int(any(x[j] == y[j + shift] == "1" for j in range(7))))
    assert len({example.prompt for example in examples}) == SIZES["eval"]
    ones = sum(example.target == "1" for example in examples) / len(examples)
    assert ones == pytest.approx(1 - (1 - 0.09) ** 7, abs=0.03)


def test_no_prompt_is_in_both_splits():
    splits = ("train", "eval")
    train, held_out = ({bits for bits, _ in islice(MEETING_OF_7.pairs(split), 2000)} for split in splits)
    assert len(train) == len(held_out) == 2000 and not train & held_out
