"""The examples of `tasks.synthetic.counting`: answers by brute force, splits, tokens."""

from __future__ import annotations

from collections import Counter

import pytest

from pause_megatron.data.supervised.examples import encode_examples
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import ConfigError
from pause_megatron.tasks import fingerprint, load_task, read_examples
from pause_megatron.tasks.synthetic.base import write_tokenizer
from pause_megatron.tasks.synthetic.counting import SIZES, CountOnes

NAME = "pause_megatron.tasks.synthetic.counting:MOD4_OF_16"


@pytest.mark.parametrize(("bits", "modulus"), [(16, 4), (9, 3), (16, 2), (24, 10)])
def test_answers_are_the_remainder_of_the_number_of_ones(bits, modulus):
    for example in CountOnes(bits=bits, modulus=modulus).examples("train", None, 500):
        digits = [int(digit) for digit in example.prompt.removesuffix("=")]
        assert len(digits) == bits and set(digits) <= {0, 1}
        remainder = 0
        for digit in digits:
            remainder = (remainder + digit) % modulus
        assert (example.target, example.references) == (str(remainder), (str(remainder),))


def test_splits_are_whole_disjoint_and_the_same_in_every_run():
    task = load_task(NAME)
    train, held_out = (read_examples(task, split) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (SIZES["train"], SIZES["eval"])
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert read_examples(task, "eval", limit=10) == held_out[:10]
    assert fingerprint(held_out) == fingerprint(load_task(NAME).examples("eval", None, None))


def test_numbers_of_ones_are_drawn_evenly():
    counts = Counter(example.prompt.count("1") for example in load_task(NAME).examples("train", None, None))
    assert set(counts) == set(range(17))
    assert all(abs(count - SIZES["train"] / 17) < 120 for count in counts.values())  # 5.6 standard deviations


def test_a_symbol_is_a_token_and_the_answer_too(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    examples = load_task(NAME).examples("eval", None, 50)
    for example, encoded in zip(examples, encode_examples(examples, tokenizer), strict=True):
        assert encoded.prompt.size == 17 and encoded.target.size == 2
        assert tokenizer.decode(encoded.prompt.tolist()) == example.prompt
        assert tokenizer.decode(encoded.target[:1].tolist()) == example.target and encoded.target[1] == tokenizer.eod


def test_nothing_is_read_from_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.path: expected none"):
        read_examples(load_task(NAME), "train", str(tmp_path))
